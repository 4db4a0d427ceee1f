"""How ComfyUI is told, before it loads a model, of the memory that modules will need, and of their copies on GPUs."""

from collections.abc import Sequence

import torch
from comfy.controlnet import ControlBase

from .loaded import LoadedModule

KEY = "controlnext_needs"


class Needs(ControlBase):
    """No control at all: a cond that has it is one more for whose control ComfyUI keeps so many bytes free.

    ComfyUI loads the modules of a MODEL with it. With several GPUs, it gives each of the others a copy of this, which
    has copies of the modules.

    Args:
        modules: those of the controls that sit in the MODEL.
        needed: bytes.
        copied: the modules are to be loaded for this.
    """

    def __init__(self, modules: Sequence[LoadedModule], needed: int, copied: bool = False):
        super().__init__()
        self.modules, self.needed, self.copied = list(dict.fromkeys(modules)), needed, copied

    def get_models(self):
        own = [module.patcher for module in self.modules] if self.copied else []
        return [*super().get_models(), *own]

    def inference_memory_requirements(self, dtype):
        return self.needed

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False):
        copy = Needs([module.copy_on(load_device) for module in self.modules], 0, copied=True)
        if autoregister:
            self.multigpu_clones[load_device] = copy
        return copy


def prepare_with(executor, modules: Sequence[LoadedModule], needs: list[tuple[int, int]], model, noise_shape,
                 conds: dict, *args, **kwargs) -> tuple:
    """Call PREPARE_SAMPLING's ``executor`` with what controls need kept free and, on other GPUs, loaded.

    Args:
        modules: those of the controls that sit in the MODEL.
        needs: ``LoadedModule.memory`` of each control; they run one after the other.
    """
    if not needs:
        return executor(model, noise_shape, conds, *args, **kwargs)

    needed = max(running for running, _ in needs) + sum(staying for _, staying in needs)
    conds = {**conds, KEY: [{"control": Needs(modules, needed)}]}
    real_model, prepared, models = executor(model, noise_shape, conds, *args, **kwargs)
    return real_model, {name: entries for name, entries in prepared.items() if name != KEY}, models
