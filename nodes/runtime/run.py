"""One run: what the controls of a sampling are for the model that runs, from its beginning to its end.

Controls travel as ``Settings``, on a MODEL among its patches, on a conditioning in its CONTROL_NET. When a
sampling begins, ``sample_under_control`` makes one Run for both; whatever ends the sampling ends it.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
from comfy.patcher_extension import WrappersMP

from .control import Control
from .forward import describe, note_conds, note_order, noted_in, picture_shape
from .injection import READY_KEY, enter_blocks, put_injection, ready_for, without_control
from .memory import prepare_with
from .messages import send_text
from .resolve import RunningModel, loaded_model_of, model_of, resolve
from .settings import SLOT, Settings, settings_in

KEY = "controlnext"  # ComfyUI keeps our wrappers under it
RUN_KEY = "controlnext_run"  # a sampling has its Run under it in transformer_options


class InRun:
    """A control that hangs on a conditioning, as a Run sees it."""

    def memory_for(self, model: RunningModel, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """``Control.memory`` for a sampling of a MODEL's latents of this shape."""
        raise NotImplementedError

    def end_run(self) -> None:
        """Give back what only the run needed."""
        raise NotImplementedError


class Run:
    """The controls of one sampling.

    Args:
        model: the one that runs; its copies on other GPUs are admitted when ComfyUI has loaded them.
        controls: {name: control} of those that sit in the MODEL.
        nets: those that hang on conditionings.
        guider: ComfyUI's, whose sampling it is; None for a call outside of a sampling.
        keeps: features are kept for later runs; not those of a training, whose noise levels hardly come again.
        packed: of ``picture_shape``, for the sampling's whole latents.
    """

    def __init__(self, model: RunningModel, controls: Mapping[object, Control], nets: Sequence[InRun] = (),
                 guider=None, keeps: bool = True, packed: Sequence[Sequence[int]] | None = None):
        self.model, self.controls, self.nets, self.guider = model, dict(controls), list(nets), guider
        self.model_options = guider.model_options if guider else {}
        self.keeps, self.packed = keeps, packed
        self._admitted = {model.base_model}
        self._sigmas: list[torch.Tensor] = []

    def __deepcopy__(self, memo) -> "Run":
        return self

    def enter(self, options: dict) -> dict:
        """A copy of a sampling's transformer_options in which the controls act."""
        ours = {WrappersMP.PREPARE_SAMPLING: self.prepare_sampling, WrappersMP.PREDICT_NOISE: self.predict_noise,
                WrappersMP.CALC_COND_BATCH: self.calc_cond_batch, WrappersMP.APPLY_MODEL: self.apply_model}
        wrappers = dict(options.get("wrappers", {}))
        for kind, wrapper in ours.items():
            wrappers[kind] = {**wrappers.get(kind, {}), KEY: [wrapper]}

        options = {**options, RUN_KEY: self, "wrappers": wrappers}
        for name, control in self.controls.items():
            put_injection(options, control.place, {name: control})
        enter_blocks(options)
        return options

    def prepare_sampling(self, executor, model, noise_shape, conds: dict, *args, **kwargs):
        """PREPARE_SAMPLING wrapper: have ComfyUI load the modules, and keep free what they need while they run."""
        shape, dtype = picture_shape(noise_shape, self.packed), model.model.get_dtype_inference()
        needs = [control.memory(shape, dtype) for control in self.controls.values()]
        needs += [net.memory_for(self.model, shape, dtype) for net in self.nets]
        modules = [control.loaded for control in self.controls.values()]

        real_model, conds, models = prepare_with(executor, modules, needs, model, noise_shape, conds, *args, **kwargs)
        self._admitted |= {one.model for one in models if getattr(one, "is_multigpu_base_clone", False)}
        return real_model, conds, models

    def predict_noise(self, executor, x, timestep, model_options=None, seed=None):
        """PREDICT_NOISE wrapper: note the step's conds; further in, windows may hold a part of the latents only."""
        return executor(x, timestep, self._note_conds(model_options or {}, x), seed)

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options: dict):
        """CALC_COND_BATCH wrapper: note the order of the conds, and the step's noise level for ``tell_never_taken``."""
        self._sigmas.append(timestep[0].detach())
        if not noted_in(model_options.get("transformer_options", {})).shape:  # some guiders ask for no wrapper before
            model_options = self._note_conds(model_options, x_in)
        return executor(model, conds, x_in, timestep, note_order(model_options, conds))

    def _note_conds(self, model_options: dict, x: torch.Tensor) -> dict:
        return note_conds(model_options, self.guider.conds, picture_shape(x.shape, self.packed))

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None,
                    **kwargs):
        """APPLY_MODEL wrapper: work out what every control adds in this call, before and outside the denoiser."""
        options, base_model = transformer_options or {}, executor.class_obj
        if base_model not in self._admitted:
            return executor(x, t, c_concat, c_crossattn, control, without_control(options), **kwargs)

        ready = options.get(READY_KEY, {})  # from controls on conditionings, perhaps for other rows than a pack made
        others = {name: one.control for name, one in ready.items() if one.rows != len(x)}
        controls = {**self.controls, **others}
        if controls:
            shape = picture_shape(x.shape, kwargs.get("latent_shapes"))
            forward = describe(base_model.model_sampling, base_model.get_dtype_inference(), shape, t, options,
                               c_crossattn)
            ready = {**ready, **{name: ready_for(one, forward) for name, one in controls.items()}}
            options = {**options, READY_KEY: ready}
            enter_blocks(options, ready)
            if "num_video_frames" in kwargs:  # SVD's; ComfyUI does not count the frame that its causal window fix adds
                kwargs["num_video_frames"] = forward.count
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def tell_never_taken(self) -> None:
        """Tell of the controls that should have acted in this run, and of which nothing took what they had to add."""
        def should_act(control: Control) -> bool:
            levels = (control.resolved.strength_at(sigma.cpu()) for sigma in self._sigmas)
            return any(control.resolved.gains) and any(levels)

        for control in self.controls.values():
            if not control.taken and (control.wanted or should_act(control)):
                tell_never_taken(control, self.model, self)

    def end(self) -> None:
        """Give back what only this run needed."""
        for one in (*self.controls.values(), *self.nets):
            one.end_run()


def add_settings(model, settings: Settings):
    """A clone of ``model`` (a ModelPatcher) in which one more control acts; ``model`` stays as it is."""
    model = model.clone()
    model.set_model_patch(settings, SLOT)
    wrappers = {WrappersMP.OUTER_SAMPLE: sample_under_control, WrappersMP.APPLY_MODEL: call_under_control}
    for kind, wrapper in wrappers.items():
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def sample_under_control(executor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: one Run from a sampling's beginning to its end."""
    guider = executor.class_obj
    before = guider.model_options
    options = before.get("transformer_options", {})
    if RUN_KEY in options:  # both the MODEL and a conditioning asked for it
        return executor(*args, **kwargs)

    model = model_of(guider.model_patcher)
    run = Run(model, controls_in(model, options), nets_in(guider.conds), guider, packed=kwargs.get("latent_shapes"))
    guider.model_options = {**before, "transformer_options": run.enter(options)}
    try:
        result = executor(*args, **kwargs)
        run.tell_never_taken()
        return result
    finally:
        guider.model_options = before
        run.end()


def call_under_control(executor, *args, **kwargs):
    """APPLY_MODEL wrapper, which a Run replaces by its own: a Run for one call that belongs to no sampling."""
    options = (kwargs.pop("transformer_options", None) or {}) if len(args) < 6 else args[5]
    model = loaded_model_of(executor.class_obj)
    run = Run(model, controls_in(model, options))
    try:
        return run.apply_model(executor, *args[:5], transformer_options=run.enter(options), **kwargs)
    finally:
        run.end()


def controls_in(model: RunningModel, options: Mapping, keeps: bool = True) -> dict[object, Control]:
    """{name in the run: Control} of the Settings in a MODEL's transformer_options, resolved for the one that runs."""
    return {("model", index): Control(settings, resolve(model, settings), keeps=keeps)
            for index, settings in enumerate(settings_in(options))}


def nets_in(conds: Mapping[str, Sequence[dict]]) -> list[InRun]:
    """The ControlNeXts that hang on conditionings, each once, also those between other ControlNets of a chain."""
    found: dict[InRun, None] = {}
    for net in (cond.get("control") for entries in conds.values() for cond in entries or ()):
        while net is not None:
            if isinstance(net, InRun):
                found[net] = None
            net = net.previous_controlnet
    return list(found)


def tell_never_taken(control: Control, model: RunningModel, run: Run | None) -> None:
    """Say, in the log and on the control's node, that a whole run took nothing of it, and what may help."""
    in_model = run is not None and control in run.controls.values()
    other = ("ControlNeXt to ControlNet with Apply ControlNet instead of Apply ControlNeXt" if in_model
             else "Apply ControlNeXt instead of ControlNeXt to ControlNet")
    culprit = own_way_of(model, run.model_options if run else {}) or "another node"
    text = (f"control at {control.resolved.place_name} was ready, but nothing took it, so this picture is drawn "
            f"without it: {culprit} probably calls the denoiser in its own way. Set inject_at to another place, use "
            f"{other}, or leave that node out.")
    logging.warning("ControlNeXt: %s", text)
    send_text(control.settings.node_id, text)


def own_way_of(model: RunningModel, model_options: dict) -> str | None:
    """The name of a pack's function that stands in the place of one of ComfyUI's, None where there is none."""
    wrapped = model_options.get("model_function_wrapper")
    for function in (wrapped, getattr(model.denoiser, "forward", None), type(model.denoiser)):
        module = getattr(function, "__module__", None) or type(function).__module__
        if function is not None and not module.startswith(("comfy.", "torch.")):
            name = (getattr(function, "__qualname__", None) or type(function).__qualname__).partition(".")[0]
            return f"{name} of {module.rpartition('custom_nodes')[2].strip('/.') or module}"
    return None
