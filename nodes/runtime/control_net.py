"""A ControlNeXt as one of ComfyUI's ControlNets: the same control, hung on a conditioning instead of the MODEL."""

import logging
from copy import deepcopy
from dataclasses import replace

import torch
from comfy.controlnet import ControlNet
from comfy.hooks import EnumHookScope, HookGroup, TransformerOptionsHook
from comfy.patcher_extension import WrappersMP

from .control import Control
from .forward import describe, picture_shape
from .images import RESIZING
from .injection import READY_KEY, enter_blocks, put_injection, ready_for
from .resolve import FEW_BITS, Resolved, RunningModel, computes_in_few_bits, loaded_model_of, resolve
from .run import KEY, RUN_KEY, InRun, Run, sample_under_control, tell_never_taken
from .settings import Settings

# ComfyUI registers it for every sampling in which such a control takes part
WRAPPER = TransformerOptionsHook({"wrappers": {WrappersMP.OUTER_SAMPLE: {KEY: [sample_under_control]}}},
                                 hook_scope=EnumHookScope.AllConditioning)
# AnimateDiff-Evolved asks for the first and sets all; Advanced-ControlNet takes the first for a sign of its own class,
# so it is there while a run lasts
WINDOW_ATTRIBUTES = ("sub_idxs", "full_latent_length", "context_length")


class ControlNeXtControlNet(ControlNet, InRun):
    """The object that a CONTROL_NET link carries.

    Others may replace at any time what a ControlNet has: ``cond_hint_original``, the control image (N, 3, H, W) in
    [0, 1], ``strength`` and ``timestep_percent_range``; or, for one call, ``cond_hint``: an image for just the latents
    that it gets (a tile), or one for each of its rows.

    Args:
        asked: the settings but for the image, the strength and the percents, which ComfyUI's Apply ControlNet gives.
    """

    def __init__(self, asked: Settings):
        # images are taken as they are, whatever the module's precision
        super().__init__(load_device=asked.controlnext.patcher.load_device, manual_cast_dtype=torch.float32)
        self.asked = asked
        self.control_model = asked.controlnext.patcher.model
        self.control_model_wrapped = asked.controlnext.patcher
        self.upscale_algorithm = RESIZING
        self.extra_hooks = HookGroup()
        self.extra_hooks.add(WRAPPER)
        self._forget()

    def _forget(self) -> None:
        """Know nothing of a run."""
        for name in WINDOW_ATTRIBUTES:
            vars(self).pop(name, None)
        self._model: RunningModel | None = None
        self._dtype: torch.dtype | None = None
        self._run: Run | None = None
        self._resolved: Resolved | None = None
        self._numbers: tuple[float, ...] | None = None
        self._control: Control | None = None
        self._hint: torch.Tensor | None = None
        self._wanted = self._taken = False  # as of ``Control``, of those before this one in the run

    def __deepcopy__(self, memo) -> "ControlNeXtControlNet":
        copy = self.copy()
        copy.set_previous_controlnet(deepcopy(self.previous_controlnet, memo))
        return copy

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        self.end_run()  # the one before may have been interrupted before anybody could tell
        self.sub_idxs = None
        self._model, self._dtype = loaded_model_of(model), model.get_dtype_inference()
        self.compression_ratio = self._model.ratio
        resolve(self._model, self._settings())  # a control that does not fit is told before the first step
        if computes_in_few_bits(self._model):  # no node is at work that could show it
            logging.warning("ControlNeXt: %s", FEW_BITS)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)

        self._run = transformer_options.get(RUN_KEY)
        shape = picture_shape(x_noisy.shape, cond.get("latent_shapes"))
        forward = describe(self.model_sampling_current, self._dtype, shape, t, transformer_options)
        pixels = tuple(side * self.compression_ratio for side in forward.size)
        if self.cond_hint is not None and tuple(self.cond_hint.shape[-2:]) == pixels:
            halves = tuple(replace(half, area=None) for half in forward.halves)
            forward = replace(forward, latent=forward.size, halves=halves)
            row_by_row = not forward.video and len(self.cond_hint) == len(x_noisy)
            control = self._control_of(self.cond_hint, row_by_row)
        else:
            control = self._control_of(self.cond_hint_original)

        # tiles get the same transformer_options one after the other, so each takes the place of the one before
        ready = {**transformer_options.get(READY_KEY, {}), ("net", self._depth()): ready_for(control, forward)}
        transformer_options[READY_KEY] = ready
        put_injection(transformer_options, control.place)
        enter_blocks(transformer_options, ready)
        if "num_video_frames" in cond:  # as in Run.apply_model
            cond["num_video_frames"] = forward.count
        return previous

    def memory_for(self, model: RunningModel, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        settings = replace(self._settings(), image=self.cond_hint_original.movedim(1, -1))
        return Control(settings, resolve(model, settings)).memory(shape, dtype)

    def end_run(self) -> None:
        copies = getattr(self, "multigpu_clones", {})  # the oldest ComfyUI samples on one GPU
        for net in (self, *copies.values()):
            net.asked.controlnext.loaded.end_run()
            net._forget()

    def cleanup(self):
        super().cleanup()
        self._note()
        if self._wanted and not self._taken:
            tell_never_taken(self._control, self._model, self._run)
        self.end_run()

    def copy(self):
        return self._copy_with(self.asked)

    def deepclone_multigpu(self, load_device, autoregister=False):
        controlnext = self.asked.controlnext
        on_device = replace(controlnext, loaded=controlnext.loaded.copy_on(load_device))
        copy = self._copy_with(replace(self.asked, controlnext=on_device))
        if autoregister:
            self.multigpu_clones[load_device] = copy
        return copy

    def get_extra_hooks(self):
        # ComfyUI gives up dynamic loading for hooks; the one of our wrapper needs that as little as a patch does
        return [hooks for hooks in super().get_extra_hooks() if hooks.hooks != [WRAPPER]]

    def _copy_with(self, asked: Settings) -> "ControlNeXtControlNet":
        copy = ControlNeXtControlNet(asked)
        self.copy_to(copy)
        return copy

    def _depth(self) -> int:
        """Number of ControlNets before this one."""
        control, depth = self.previous_controlnet, 0
        while control is not None:
            control, depth = control.previous_controlnet, depth + 1
        return depth

    def _settings(self) -> Settings:
        """The settings at this moment, without an image."""
        start, end = self.timestep_percent_range
        return replace(self.asked, strength=self.strength, start_percent=start, end_percent=end)

    def _control_of(self, hint: torch.Tensor, row_by_row: bool = False) -> Control:
        """The run's Control for a hint, made anew when the hint, the strength or the percents are others."""
        numbers = (self.strength, *self.timestep_percent_range)
        if self._numbers != numbers:
            self._resolved, self._numbers = resolve(self._model, self._settings()), numbers
            self._hint = None
        if self._hint is not hint or self._control.row_by_row != row_by_row:
            self._note()
            settings = replace(self._settings(), image=hint.movedim(1, -1))
            keeps = self._run is None or self._run.keeps
            self._control, self._hint = Control(settings, self._resolved, row_by_row, keeps), hint
        return self._control

    def _note(self) -> None:
        """Remember of a Control what ``cleanup`` wants to know."""
        if self._control is not None:
            self._wanted |= self._control.wanted
            self._taken |= self._control.taken

