"""How control gets into ComfyUI's denoisers: patches that normalize and add what waits for them.

What a control adds in one call of the denoiser is worked out before the call, outside the (perhaps compiled) denoiser,
and waits in its transformer_options as ``Ready``. A pack may call the denoiser in its own way: where nothing waits at a
place, or something for other rows, it is worked out there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...controlnext_core.cross_normalization import add_controls, add_to_tokens
from ...controlnext_core.sizes import halved
from .control import Control
from .forward import Forward, describe, noted_in
from .places import AFTER_SLOTS, MIDDLE_SLOT, NEXT_BLOCK, NEXT_SLOT, POST_INPUT, TOKEN_SLOT, Place

READY_KEY = "controlnext_ready"  # in a call's transformer_options: {name of a control in the run: Ready}
ADDED_KEY = "controlnext_added"  # in a call's options or a block's arguments: the places that have had their control


@dataclass(frozen=True)
class Ready:
    """The addition of one control in one call of the denoiser.

    Attributes:
        place: the control's.
        rows: the size of the call's batch.
        added: (features, weights) for ``cross_normalization.add_controls``, None where it does not act.
    """

    control: Control
    place: Place
    rows: int
    added: tuple[torch.Tensor, torch.Tensor] | None


def ready_for(control: Control, forward: Forward) -> Ready:
    """Work out what a control adds in one call."""
    return Ready(control, control.place, forward.rows, control(forward))


class Injection:
    """A patch in ComfyUI's own protocol: adds whatever waits for one place to the features there.

    All of it normalizes against the same features, so the order of the Apply nodes does not matter.

    Args:
        controls: {name in the run: control} of those that a MODEL carries to this place.
        slot: the list of patches that holds this one; NEXT_SLOT for the middle in a forward that calls no patch there.
    """

    def __init__(self, place: Place, controls: Mapping[object, Control] | None = None, slot: str | None = None):
        self.place, self.controls, self.slot = place, dict(controls or {}), slot or place.slot
        self.block = place.block if self.slot == place.slot else NEXT_BLOCK

    def __call__(self, *args):
        if self.slot in AFTER_SLOTS:
            return self._after_block(*args)
        if self.slot == POST_INPUT:
            return self._after_input(*args)
        if self.slot == "middle_block_after_patch":
            h, rest, options = args[0]["h"], None, args[0]["transformer_options"]
        else:  # (h, options) after an input block, (h, skip, options) before an output block
            h, *rest, options = args

        if options.get("block") == self.block and not self._was_added(options):
            waiting = waiting_at(self.place, self.controls, options, h)
            h = add_controls(h, waiting) if waiting else h
        if rest is None:
            return {"h": h}
        return (h, *rest) if rest else h

    def _was_added(self, options: dict) -> bool:
        """Whether the patch at the middle itself has had its turn in this call."""
        if self.slot != self.place.slot:
            return options.pop(ADDED_KEY, None) is not None
        if self.slot == MIDDLE_SLOT != NEXT_SLOT:
            options[ADDED_KEY] = self.place
        return False

    def _after_block(self, args: dict) -> dict:
        if args["block_index"] != self.place.block[1]:
            return {}
        waiting = waiting_at(self.place, self.controls, args["transformer_options"], args["img"])
        if not waiting:
            return {}
        img = args["img"].clone() if args["img"].requires_grad else args["img"]  # ComfyUI writes over it
        return {"img": add_to_tokens(img, waiting, self.place.fill)}

    def _after_input(self, args: dict) -> dict:
        img = args["img"].flatten(1, -2)  # some keep frames, rows and columns apart
        waiting = waiting_at(self.place, self.controls, args["transformer_options"], img)
        return {**args, "img": add_to_tokens(img, waiting, self.place.fill).view_as(args["img"])} if waiting else args

    def __deepcopy__(self, memo) -> "Injection":
        return self

    def to(self, device_or_dtype):
        return self  # features are made where and as the denoiser needs them, in each call


class BeforeBlock:
    """A replacement of a transformer's block in ComfyUI's own protocol, which adds control to what the block gets.

    Args:
        controls: as in ``Injection``.
        ready: the additions for this one call, since packs call a block without transformer_options; None before it.
        replacement: the function that would be called in its place, None for the block itself.
    """

    def __init__(self, place: Place, controls: Mapping[object, Control], ready: Mapping[object, Ready] | None,
                 replacement: Callable | None):
        self.place, self.controls, self.ready, self.replacement = place, controls, ready, replacement

    def __call__(self, args: dict, extra: dict) -> dict:
        if self.place not in args.get(ADDED_KEY, ()):
            options = args.get("transformer_options") or {}
            if self.ready is not None:
                options = {**options, READY_KEY: self.ready}
            picture, *sound = args["img"] if isinstance(args["img"], tuple) else (args["img"],)
            waiting = waiting_at(self.place, self.controls, options, picture)
            if waiting:
                picture = add_to_tokens(picture, waiting, self.place.fill)
                img = (picture, *sound) if sound else picture
                args = {**args, "img": img, ADDED_KEY: (*args.get(ADDED_KEY, ()), self.place)}
        return extra["original_block"](args) if self.replacement is None else self.replacement(args, extra)

    def __deepcopy__(self, memo) -> "BeforeBlock":
        return self


def waiting_at(place: Place, controls: Mapping[object, Control], options: dict,
               h: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(features, weights) of all that is to be added to the denoiser's features ``h`` at a place in this call."""
    ready = options.get(READY_KEY, {})
    waiting = [one for one in ready.values() if one.place == place]
    if any(one.rows != h.shape[0] for one in waiting) or any(name not in ready for name in controls):
        waiting = _worked_out_here(place, controls, options, h)

    added = []
    for one in waiting:
        if one.added is not None:
            one.control.taken = True
            added.append(one.added)
    return added


def _worked_out_here(place: Place, controls: Mapping[object, Control], options: dict, h: torch.Tensor) -> list[Ready]:
    """The additions for a call that came with other rows than were told, or that nobody told of."""
    ready = options.get(READY_KEY, {})
    found = {**controls, **{name: one.control for name, one in ready.items() if one.place == place}}
    shape = _latent_shape(place, options, h)
    if shape is None or options.get("sigmas") is None:
        return []

    forwards = {}
    for control in found.values():
        if control.sampling not in forwards:
            t = options["sigmas"].to(h.device)
            forwards[control.sampling] = describe(control.sampling, h.dtype, shape, t, options)
    return [ready_for(control, forwards[control.sampling]) for control in found.values()]


def _latent_shape(place: Place, options: dict, h: torch.Tensor) -> tuple[int, ...] | None:
    """The shape of the latents that a denoiser's features ``h`` at a place come from; None where nothing tells it."""
    noted = noted_in(options)
    areas = [half.area[:2] for halves in noted.lists.values() for half in halves.values() if half.area is not None]
    sizes = [*(tuple(noted.shape[-2:]) for _ in noted.shape[:1]), *areas]
    if h.ndim == 4:
        size = tuple(h.shape[-2:])
        same = [latent for latent in sizes if halved(latent, place.halvings) == size]
        return h.shape[0], 0, *(same[0] if same else (side << place.halvings for side in size))

    frames = noted.shape[2:-2]
    tokens = [(latent, halved(latent, place.halvings)) for latent in sizes]
    same = [latent for latent, (height, width) in tokens if height * width * max(frames, default=1) <= h.shape[1]]
    return (h.shape[0], 0, *frames, *same[0]) if same else None


def put_injection(options: dict, place: Place, controls: Mapping[object, Control] | None = None) -> None:
    """Put patches for a place into transformer_options, for these controls and those of the patches that are there.

    The lists and dicts in them stay as they are, since others share them.
    """
    for slot in (place.slot, NEXT_SLOT) if place.slot == MIDDLE_SLOT != NEXT_SLOT else (place.slot,):
        patches = options.get("patches", {})
        here = next((patch for patch in patches.get(slot, ()) if is_injection(patch, place)), None)
        known = {} if here is None else here.controls
        others = [patch for patch in patches.get(slot, ()) if patch is not here]
        injection = Injection(place, {**known, **(controls or {})}, slot)
        options["patches"] = {**patches, slot: [*others, injection]}


def enter_blocks(options: dict, ready: Mapping[object, Ready] | None = None) -> None:
    """Put the injections of TOKEN_SLOT before the blocks of a transformer.

    A block has one replacement. Those of others are called and not dropped.
    """
    injections = options.get("patches", {}).get(TOKEN_SLOT)
    if not injections:
        return

    replaced = options.get("patches_replace", {})
    blocks = dict(replaced.get("dit", {}))
    for injection in injections:
        block = injection.place.block
        there = blocks.get(block)
        if isinstance(there, BeforeBlock) and there.place == injection.place:
            there = there.replacement
        blocks[block] = BeforeBlock(injection.place, injection.controls, ready, there)
    options["patches_replace"] = {**replaced, "dit": blocks}


def without_control(options: dict) -> dict:
    """transformer_options as they are without any control: for a denoiser that it is not meant for."""
    options = {key: value for key, value in options.items() if key != READY_KEY}
    patches = options.get("patches", {})
    options["patches"] = {slot: [patch for patch in patches[slot] if not isinstance(patch, Injection)]
                          for slot in patches}

    replaced = options.get("patches_replace", {})
    if "dit" in replaced:
        bare = {block: there.replacement if isinstance(there, BeforeBlock) else there
                for block, there in replaced["dit"].items()}
        blocks = {block: there for block, there in bare.items() if there is not None}
        options["patches_replace"] = {**replaced, "dit": blocks}
    return options


def is_injection(patch: object, place: Place) -> bool:
    """Whether a patch is the one for a place."""
    return isinstance(patch, Injection) and patch.place == place
