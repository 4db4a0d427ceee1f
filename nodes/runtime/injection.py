"""How control gets into ComfyUI's denoisers: patches that add, and wrappers that prepare what they add.

A patch object at each place adds what transformer_options hold ready for it. For every forward, ``run_controls`` (of
controls that sit in the MODEL) and ``serve`` (of controls that hang on a conditioning) have the modules run outside the
(perhaps compiled) denoiser and hand the result over.
"""

from collections.abc import Callable

from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...controlnext_core.cross_normalization import add_controls, add_to_tokens
from .control import Control
from .forward import Forward, describe, note_conds
from .memory import prepare
from .places import AFTER_SLOTS, INPUT_SLOT, MIDDLE_SLOT, TOKEN_SLOT, Place

KEY = "controlnext"


class Injection:
    """A patch in ComfyUI's own protocol: adds whatever is ready for one place to the features there.

    All of it normalizes against the same features, so the order of the Apply nodes does not matter.

    Args:
        controls: those that sit in the MODEL.
    """

    def __init__(self, place: Place, controls: tuple[Control, ...] = ()):
        self.place = place
        self.controls = controls

    def __call__(self, *args):
        if self.place.slot in AFTER_SLOTS:
            return self._after_block(*args)
        if self.place.slot == "middle_block_after_patch":
            h, rest, options = args[0]["h"], None, args[0]["transformer_options"]
        else:  # (h, options) after an input block, (h, skip, options) before an output block
            h, *rest, options = args
        ready = _ready(options, self.place)
        if ready and options["block"] == self.place.block:
            h = add_controls(h, ready)
        if rest is None:
            return {"h": h}
        return (h, *rest) if rest else h

    def _after_block(self, args: dict) -> dict:
        ready = _ready(args["transformer_options"], self.place)
        if not ready or args["block_index"] != self.place.block[1]:
            return {}
        img = args["img"].clone() if args["img"].requires_grad else args["img"]  # ComfyUI writes over it
        return {"img": add_to_tokens(img, ready, self.place.fill)}

    def to(self, device_or_dtype):
        return self  # features are made where and as the UNet needs them, at each forward

    def models(self):
        return list(dict.fromkeys(control.patcher for control in self.controls))


class BeforeBlock:
    """A replacement of a transformer's block in ComfyUI's own protocol, which adds control to what the block gets.

    Args:
        replacement: what would be called in its place, None for the block itself.
    """

    def __init__(self, place: Place, replacement: Callable | None):
        self.place = place
        self.replacement = replacement

    def __call__(self, args: dict, extra: dict) -> dict:
        ready = _ready(args["transformer_options"], self.place)
        if ready:
            args = {**args, "img": add_to_tokens(args["img"], ready, self.place.fill)}
        return extra["original_block"](args) if self.replacement is None else self.replacement(args, extra)


def _ready(options: dict, place: Place) -> list[tuple]:
    """What all controls of one place add in this forward."""
    return [one for places in options.get(KEY, {}).values() for one in places.get(place, ())]


def add_control(model, control: Control):
    """A clone of ``model`` (a ModelPatcher) in which ``control`` acts beside any others; ``model`` stays as it is."""
    model = model.clone()
    options = model.model_options["transformer_options"]
    here = _injection_at(options, control.place)
    controls = () if here is None else here.controls
    _put_injection(options, Injection(control.place, (*controls, control)))
    if not model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, run_controls)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, note_conds)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, tell_memory)
        model.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, end_run)  # 0.16 does not call the patches' cleanup
    return model


def serve(options: dict, source: int, control: Control, forward: Forward) -> None:
    """Have ``control`` act in the one forward that gets these transformer_options, in place of what ``source`` gave.

    Args:
        source: tells the controls of a forward apart; the same one for the same control in the next forward, since
            tiles get the same transformer_options one after the other.
    """
    prepared = control(forward)
    options[KEY] = {**options.get(KEY, {}), source: {} if prepared is None else {control.place: [prepared]}}
    if _injection_at(options, control.place) is None:
        _put_injection(options, Injection(control.place))
    _enter_blocks(options)


def _injection_at(options: dict, place: Place) -> Injection | None:
    return next((injection for injection in _injections(options) if injection.place == place), None)


def _put_injection(options: dict, injection: Injection) -> None:
    """Put a patch into transformer_options, in place of the one for the same place; lists that are there stay."""
    patches, slot = options.get("patches", {}), injection.place.slot
    others = [patch for patch in patches.get(slot, ())
              if not (isinstance(patch, Injection) and patch.place == injection.place)]
    options["patches"] = {**patches, slot: [*others, injection]}


def _enter_blocks(options: dict) -> None:
    """Put the injections of TOKEN_SLOT before the blocks of a transformer.

    A block has one replacement. Only in a forward are those of all others known, which are called and not dropped.
    """
    injections = options.get("patches", {}).get(TOKEN_SLOT)
    if not injections:
        return
    replaced = options.get("patches_replace", {})
    blocks = dict(replaced.get("dit", {}))
    for place in (injection.place for injection in injections):
        if not isinstance(blocks.get(place.block), BeforeBlock):
            blocks[place.block] = BeforeBlock(place, blocks.get(place.block))
    options["patches_replace"] = {**replaced, "dit": blocks}


def end_run(model):
    """ON_CLEANUP callback, after every sampling, also one that was interrupted."""
    for injection in _injections(model.model_options["transformer_options"]):
        for control in injection.controls:
            control.loaded.end_run()


def _injections(options: dict) -> list[Injection]:
    return [patch for slot in (INPUT_SLOT, MIDDLE_SLOT, TOKEN_SLOT, *AFTER_SLOTS)
            for patch in options.get("patches", {}).get(slot, ()) if isinstance(patch, Injection)]


def tell_memory(executor, model, noise_shape, conds, *args, **kwargs):
    """PREPARE_SAMPLING wrapper: have ComfyUI keep free what the modules of controls that sit in the MODEL need."""
    needs = [control.memory(tuple(noise_shape), model.model.get_dtype_inference())
             for injection in _injections(model.model_options["transformer_options"]) for control in injection.controls]
    return prepare(executor, needs, model, noise_shape, conds, *args, **kwargs)


def run_controls(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """APPLY_MODEL wrapper: compute what every control adds in this forward, before and outside the denoiser."""
    transformer_options = transformer_options or {}
    base_model = executor.class_obj
    forward = describe(base_model.model_sampling, base_model.get_dtype_inference(), x, t, transformer_options)
    ready = {}
    for injection in _injections(transformer_options):
        controls = [prepared for prepared in (one(forward) for one in injection.controls) if prepared is not None]
        if controls:
            ready[injection.place] = controls
    if "num_video_frames" in kwargs:  # SVD's; ComfyUI does not count the frame that its causal window fix adds
        kwargs["num_video_frames"] = forward.count
    transformer_options = {**transformer_options, KEY: {**transformer_options.get(KEY, {}), "model": ready}}
    _enter_blocks(transformer_options)
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
