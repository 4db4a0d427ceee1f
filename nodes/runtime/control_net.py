"""A ControlNeXt as one of ComfyUI's ControlNets: the same control, hung on a conditioning instead of the MODEL."""

import logging
from dataclasses import replace

import torch
from comfy.controlnet import ControlNet
from comfy.hooks import EnumHookScope, HookGroup, TransformerOptionsHook
from comfy.patcher_extension import WrappersMP

from .control import RESIZING, Control, control_image, memory_of
from .forward import describe, note_conds
from .injection import KEY, serve
from .loaded import ControlNeXt
from .memory import prepare
from .resolve import FEW_BITS, computes_in_few_bits, settle


def tell_memory(executor, model, noise_shape, conds: dict, *args, **kwargs):
    """PREPARE_SAMPLING wrapper: have ComfyUI keep free what the modules of controls on the conditionings need."""
    controls = {}
    for control in (cond.get("control") for entries in conds.values() for cond in entries):
        while control is not None:
            controls[control] = isinstance(control, ControlNeXtControlNet)
            control = control.previous_controlnet
    needs = [control.memory(model.model, tuple(noise_shape)) for control, ours in controls.items() if ours]
    return prepare(executor, needs, model, noise_shape, conds, *args, **kwargs)


# ComfyUI registers it for every sampling in which such a control takes part
WRAPPERS = TransformerOptionsHook({"wrappers": {WrappersMP.PREDICT_NOISE: {KEY: [note_conds]},
                                                WrappersMP.PREPARE_SAMPLING: {KEY: [tell_memory]}}},
                                  hook_scope=EnumHookScope.AllConditioning)


class ControlNeXtControlNet(ControlNet):
    """What a CONTROL_NET link carries.

    Others may replace at any time what a ControlNet has: ``cond_hint_original``, the control image (N, 3, H, W) in
    [0, 1], and ``strength``; or, for one forward, ``cond_hint``: an image for just the latents that it gets (a tile),
    or one for each of its rows.
    """

    def __init__(self, controlnext: ControlNeXt, inject_at: str = "auto", apply_to: str = "auto"):
        # images are taken as they are, whatever the module's precision
        super().__init__(load_device=controlnext.patcher.load_device, manual_cast_dtype=torch.float32)
        self.controlnext = controlnext
        self.control_model, self.control_model_wrapped = controlnext.patcher.model, controlnext.patcher
        self.inject_at, self.apply_to = inject_at, apply_to
        self.upscale_algorithm = RESIZING
        self.extra_hooks = HookGroup()
        self.extra_hooks.add(WRAPPERS)
        self._dtype = self._settled = None
        self._asked = self._control = None

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        self._dtype = model.get_dtype_inference()
        self.compression_ratio = model.latent_format.spacial_downscale_ratio
        self._settled = settle(model, self.controlnext, self.inject_at, self.apply_to)
        if computes_in_few_bits(model):  # no node is at work that could show it
            logging.warning("ControlNeXt: %s", FEW_BITS)
        self.controlnext.loaded.end_run()  # of a run that was interrupted

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        forward = describe(self.model_sampling_current, self._dtype, x_noisy, t, transformer_options)
        pixels = tuple(side * self.compression_ratio for side in forward.size)
        if self.cond_hint is not None and tuple(self.cond_hint.shape[-2:]) == pixels:
            halves = tuple(replace(half, area=None) for half in forward.halves)
            forward = replace(forward, latent=forward.size, halves=halves)
            row_by_row = not forward.video and len(self.cond_hint) == len(x_noisy)
            control = self._control_of(self.cond_hint, row_by_row)
        else:
            control = self._control_of(self.cond_hint_original, row_by_row=False)
        serve(transformer_options, self._depth(), control, forward)
        if "num_video_frames" in cond:  # see run_controls
            cond["num_video_frames"] = forward.count
        return previous

    def memory(self, base_model, shape: tuple[int, ...]) -> tuple[int, int]:
        """``memory_of`` for a sampling of a MODEL's latents of this shape. ValueError: as of ``settle``."""
        family, place, _ = settle(base_model, self.controlnext, self.inject_at, self.apply_to)
        return memory_of(self.controlnext.loaded, family, place, len(self.cond_hint_original),
                         base_model.latent_format.spacial_downscale_ratio, shape, base_model.get_dtype_inference())

    def cleanup(self):
        super().cleanup()
        self._dtype = self._settled = self._asked = self._control = None
        self.controlnext.loaded.end_run()

    def copy(self):
        return self._copy_with(self.controlnext)

    def deepclone_multigpu(self, load_device, autoregister=False):
        copy = self._copy_with(replace(self.controlnext, loaded=self.controlnext.loaded.on_device(load_device)))
        if autoregister:
            self.multigpu_clones[load_device] = copy
        return copy

    def get_extra_hooks(self):
        # ComfyUI gives up dynamic loading for hooks; the one of our wrappers needs that as little as a patch does
        return [hooks for hooks in super().get_extra_hooks() if hooks.hooks != [WRAPPERS]]

    def _copy_with(self, controlnext: ControlNeXt) -> "ControlNeXtControlNet":
        copy = ControlNeXtControlNet(controlnext, self.inject_at, self.apply_to)
        self.copy_to(copy)
        return copy

    def _depth(self) -> int:
        """Number of ControlNets before this one."""
        control, depth = self.previous_controlnet, 0
        while control is not None:
            control, depth = control.previous_controlnet, depth + 1
        return depth

    def _control_of(self, hint: torch.Tensor, row_by_row: bool) -> Control:
        asked = (hint, row_by_row, self.strength)
        if self._control is None or any(old is not new for old, new in zip(self._asked, asked, strict=True)):
            family, place, gains = self._settled
            self._asked, self._control = asked, Control(
                self.controlnext, family, place, control_image(hint.movedim(1, -1)), None,
                tuple(self.strength * gain for gain in gains), tuple(float(sigma) for sigma in self.timestep_range),
                self.compression_ratio, family.window_reference, fits_areas=True, row_by_row=row_by_row)
        return self._control
