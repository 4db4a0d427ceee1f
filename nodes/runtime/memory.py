"""How a wrapper tells ComfyUI, before it loads a model, of memory that the sampling will need besides."""

from comfy.controlnet import ControlBase

KEY = "controlnext_reserve"


class Reserve(ControlBase):
    """No control at all: a cond that has it is one more for whose control ComfyUI keeps so many bytes free."""

    def __init__(self, needed: int):
        super().__init__()
        self.needed = needed

    def inference_memory_requirements(self, dtype):
        return self.needed

    def deepclone_multigpu(self, load_device, autoregister=False):
        clone = Reserve(0)
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone


def prepare(executor, needs: list[tuple[int, int]], model, noise_shape, conds: dict, *args, **kwargs) -> tuple:
    """What PREPARE_SAMPLING's ``executor`` returns, with what modules need kept free when it loads models.

    Args:
        needs: ``LoadedModule.memory`` of each; they run one after the other.
    """
    needed = max(running for running, _ in needs) + sum(staying for _, staying in needs)
    conds = {**conds, KEY: [*conds.get(KEY, ()), {"control": Reserve(needed)}]}  # beside what the other route tells
    real_model, prepared, models = executor(model, noise_shape, conds, *args, **kwargs)
    return real_model, {name: entries for name, entries in prepared.items() if name != KEY}, models
