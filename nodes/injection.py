"""How control gets into ComfyUI's denoisers: patches that add, and wrappers that prepare what they add.

A patch object at each place adds what transformer_options hold ready for it. For every forward, ``run_controls`` (of
controls that sit in the MODEL) and ``serve`` (of controls that hang on a conditioning) have the modules run outside the
(perhaps compiled) denoiser and hand the result over.
"""

from collections.abc import Callable

from comfy.model_sampling import CONST
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..controlnext_core.cross_normalization import add_controls, add_to_tokens
from .control import Control, Forward, Half
from .places import AFTER_SLOTS, INPUT_SLOT, MIDDLE_SLOT, TOKEN_SLOT, Place
from .reserve import prepare

KEY = "controlnext"
CONDS_KEY = "controlnext_conds"


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


def note_conds(executor, x, timestep, model_options=None, seed=None):
    """PREDICT_NOISE wrapper: note which cond is positive and which area it has; further in, only its uuid is left."""
    model_options = model_options or {}
    conds = {cond["uuid"]: Half(name == "positive", *_clamped(cond.get("area"), tuple(x.shape[2:])))
             for name, conds in executor.class_obj.conds.items() for cond in conds or ()}
    options = {**model_options.get("transformer_options", {}), CONDS_KEY: (conds, tuple(x.shape))}
    return executor(x, timestep, {**model_options, "transformer_options": options}, seed)


def _clamped(area, latent: tuple[int, ...]) -> tuple[tuple[int, int, int, int] | None, int]:
    """A cond's (height, width, top, left), cut at the latent's edges as ComfyUI cuts the latent itself; first frame."""
    if area is None:
        return None, 0
    dimensions = len(area) // 2  # of an area of a video three, frames first
    *_, height, width = area[:dimensions]
    *start, top, left = area[dimensions:]
    return (min(latent[-2] - top, height), min(latent[-1] - left, width), top, left), start[0] if start else 0


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


def describe(sampling, dtype, x, t, options: dict) -> Forward:
    """The Forward of one APPLY_MODEL call on the latents ``x`` (B, C, H, W) or (B, C, F, H, W) at sigmas ``t`` (B,).

    Args:
        sampling: the MODEL's model_sampling.
        dtype: of its features.
    """
    size = tuple(x.shape[-2:])
    indices = options.get("cond_or_uncond") or [0]
    conds, whole = options.get(CONDS_KEY, ({}, tuple(x.shape)))
    uuids = options.get("uuids") or [None] * len(indices)
    # conds that a patch made for itself are not noted; ComfyUI puts the positive one first
    halves = tuple(conds.get(uuid) or Half(index == 0) for uuid, index in zip(uuids, indices, strict=True))
    rows = x.shape[0] // len(halves)
    # more rows than there are in the whole batch are those of several tiles, all halves of a tile together
    rows_of_half = rows if rows % whole[0] else whole[0]
    if any(half.area is None for half in halves):
        whole = tuple(x.shape)
    halves *= rows // rows_of_half
    video = x.ndim == 5 and (whole[2] > 1 or options.get("context_window") is not None)
    frames, total = _frames(whole[2] if video else rows_of_half, options, 2 if video else 0)
    count = x.shape[2] if video else len(frames)
    # the module is given 0 to 1000, of flow models too, some of which count from 0 to 1
    timesteps = (1000 * t if isinstance(sampling, CONST) else sampling.timestep(t))[:rows_of_half].float()
    return Forward(float(t[0]), tuple(timesteps.tolist()), halves, whole[-2:], size, frames, count, total, dtype,
                   x.device, video)


def _frames(samples: int, options: dict, dim: int) -> tuple[tuple[int, ...], int]:
    """Which entries of the whole batch or video a half holds along dimension ``dim``, and how many there are in all."""
    window = options.get("context_window")
    if window is not None:
        if window.dim != dim:
            raise ValueError(f"dim: the context windows of this controlled MODEL run over frames, dimension {dim}, but "
                             f"dim is {window.dim}; set dim to {dim} in Context Windows (Manual).")
        anchor = getattr(window, "causal_anchor_index", None)
        frames = list(window.index_list)
        return tuple(frames if anchor is None or anchor < 0 else [anchor, *frames]), window.total_frames
    animatediff = options.get("ad_params") or {}
    if animatediff.get("sub_idxs") is not None:
        return tuple(animatediff["sub_idxs"]), animatediff["full_length"]
    return tuple(range(samples)), samples
