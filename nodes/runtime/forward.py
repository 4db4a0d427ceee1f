"""One call of ComfyUI's denoiser, decoded: whose rows are in its batch, which frames and which part of the picture.

ComfyUI puts what it can into one batch. With two tiles of one picture, a batch of 2 and cfg above 1, the latents of a
call have 8 rows, in this order (tiled samplers keep the halves of a tile together):

    row     0        1        2        3        4        5        6        7
    tile    0        0        0        0        1        1        1        1
    half    cond     cond     uncond   uncond   cond     cond     uncond   uncond
    sample  0        1        0        1        0        1        0        1

``describe`` reads that off ``transformer_options``: ``cond_or_uncond`` is [0, 1], so there are 8 / 2 = 4 rows for each
half, twice as many as the batch of 2 that ``note_conds`` noted. The Forward has halves (cond, uncond, cond, uncond),
2 samples each. What is worked out for (cond, uncond) then serves all tiles of that size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from comfy.model_sampling import CONST

CONDS_KEY = "controlnext_conds"
POSITIVE = "positive"


@dataclass(frozen=True)
class Half:
    """One guidance half of a batch.

    Attributes:
        positive: it is the positive one.
        area: (height, width, top, left) of the latent that it is for, None for all of it.
        start: the first of the video's latent frames, or of a context window's, that it is for.
    """

    positive: bool
    area: tuple[int, int, int, int] | None = None
    start: int = 0


@dataclass(frozen=True)
class Forward:
    """One call of the denoiser, as all controls need to know it.

    Attributes:
        sigma: noise level of the call, () on the CPU, in the sampler's dtype, as ComfyUI compares it with percents.
        timesteps: the denoiser's own timestep for each sample of a half.
        at: the same on the device, (samples,).
        halves: the guidance halves in the batch, in order; all of them again for each tile of a tiled picture.
        rows: the size of the batch.
        latent: (H, W) of the whole latent.
        size: (H, W) of the latent in this call, smaller than ``latent`` for a regional cond.
        frames: for each sample of a half, its index in the whole batch or video; for 5-D video latents, the index of
            each latent frame in the whole video, those before a half's ``start`` too, without guides.
        count: samples of a half, or latent frames.
        total: samples of the whole batch or video.
        dtype, device: those of the denoiser's features.
        video: the latents are videos, and all samples share the frames.
        thread_device: the device of a thread of several, when ComfyUI samples on several GPUs.
    """

    sigma: torch.Tensor
    timesteps: tuple[float, ...]
    at: torch.Tensor
    halves: tuple[Half, ...]
    rows: int
    latent: tuple[int, int]
    size: tuple[int, int]
    frames: tuple[int, ...]
    count: int
    total: int
    dtype: torch.dtype
    device: torch.device
    video: bool = False
    thread_device: torch.device | None = None

    def frames_of(self, half: Half) -> tuple[int, ...]:
        """Those of ``frames`` that are a half's."""
        return self.frames[half.start:half.start + self.count]


@dataclass(frozen=True)
class NotedConds:
    """The conds of a step, before ComfyUI puts them into calls, in which only their uuids are left.

    Attributes:
        lists: {name of the guider's list: {uuid: Half}}, in the guider's order. A cond with an area may stand in two
            lists, since ComfyUI gives the other lists a twin of it under the same uuid.
        shape: the whole latents' shape, () where nothing is noted.
        names: the list's name for each index in ``cond_or_uncond``, None for an unknown list.
        prompts: (Half, cross-attention context (1 or B, tokens, C)) of all conds that have one.
        guides: latent frames behind the video's own, which show the denoiser what to draw (LTX-Video's Add Guide).
    """

    lists: Mapping[str, Mapping[object, Half]] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    names: tuple[str | None, ...] = ()
    prompts: tuple[tuple[Half, torch.Tensor], ...] = ()
    guides: int = 0

    def half(self, index: int, uuid: object) -> Half:
        """The half that a call names by its index in ``cond_or_uncond`` and its uuid."""
        found = {name: halves[uuid] for name, halves in self.lists.items() if uuid in halves}
        name = self.names[index] if index < len(self.names) else None
        if name in found:
            return found[name]

        if len(found) == 1:
            return next(iter(found.values()))

        # conds that a patch made for itself are not noted; ComfyUI puts the positive one first
        twin = next(iter(found.values()), Half(False))
        return replace(twin, positive=index == 0)


def note_conds(model_options: dict, conds: Mapping[str, Sequence[dict] | None], shape: tuple[int, ...]) -> dict:
    """model_options in which is noted which cond is in which of a guider's lists, and its area.

    Args:
        conds: the guider's, as ComfyUI has prepared them.
        shape: the whole latents' shape.
    """
    lists: dict[str, dict] = {}
    prompts, guides = [], 0
    for name, entries in conds.items():
        halves = lists[name] = {}
        for cond in entries or ():
            half = halves[cond.get("uuid")] = Half(name == POSITIVE, *_clamped(cond.get("area"), shape[2:]))
            context = _given(cond, "c_crossattn")
            if torch.is_tensor(context):
                prompts.append((half, context))

            positions = _given(cond, "keyframe_idxs")  # (B, 3, tokens, 2), a token is a latent pixel
            if positions is not None:
                guides = positions.shape[2] // math.prod(shape[-2:])
    return _with_noted(model_options, NotedConds(lists, shape, prompts=tuple(prompts), guides=guides))


def _given(cond: dict, name: str):
    """The value that a cond gives the denoiser under this name, None where it gives none."""
    return getattr(cond.get("model_conds", {}).get(name), "cond", None)


def note_order(model_options: dict, conds: Sequence[Sequence[dict] | None]) -> dict:
    """model_options in which is noted, too, which of the guider's lists each index of ``cond_or_uncond`` is."""
    noted = noted_in(model_options.get("transformer_options", {}))

    def name_of(entries: Sequence[dict] | None) -> str | None:
        uuids = [cond.get("uuid") for cond in entries or ()]
        return next((name for name, halves in noted.lists.items() if uuids and list(halves) == uuids), None)

    return _with_noted(model_options, replace(noted, names=tuple(name_of(entries) for entries in conds)))


def noted_in(options: dict) -> NotedConds:
    """The conds that are noted in a step's transformer_options."""
    return options.get(CONDS_KEY, NotedConds())


def _with_noted(model_options: dict, noted: NotedConds) -> dict:
    options = {**model_options.get("transformer_options", {}), CONDS_KEY: noted}
    return {**model_options, "transformer_options": options}


def _clamped(area, latent: tuple[int, ...]) -> tuple[tuple[int, int, int, int] | None, int]:
    """A cond's (height, width, top, left), cut at the latent's edges as ComfyUI cuts the latent itself; first frame."""
    if area is None:
        return None, 0
    dimensions = len(area) // 2  # an area of a video has three, frames first
    *_, height, width = area[:dimensions]
    *start, top, left = area[dimensions:]
    return (min(latent[-2] - top, height), min(latent[-1] - left, width), top, left), start[0] if start else 0


def picture_shape(shape: Sequence[int], packed: Sequence[Sequence[int]] | None) -> tuple[int, ...]:
    """The shape of the latents of a picture or video, with which ComfyUI may have packed those of its sound.

    Args:
        shape: of the latents as ComfyUI hands them on, (B, 1, N) where they are packed.
        packed: ``latent_shapes``, those of what is in them, the picture first; None where ComfyUI does not tell.
    """
    return (shape[0], *packed[0][1:]) if packed and len(packed) > 1 else tuple(shape)


def describe(sampling, dtype: torch.dtype, shape: tuple[int, ...], t: torch.Tensor, options: dict,
             context: torch.Tensor | None = None) -> Forward:
    """The Forward of one call of the denoiser.

    Args:
        sampling: the MODEL's model_sampling.
        dtype: that of the denoiser's features.
        shape: the latents', (B, C, H, W) or (B, C, F, H, W).
        t: their sigmas, (B,) or (1,) for all.
        options: the call's transformer_options.
        context: for cross-attention, (B, tokens, C), which tells whose rows they are when they are not those noted.
    """
    noted = noted_in(options)
    halves, samples = _halves(shape[0], noted, options, context)
    whole = noted.shape or shape
    if any(half.area is None for half in halves):
        whole = shape

    video = len(shape) == 5 and (whole[2] > 1 or options.get("context_window") is not None)
    frames, total = _frames(whole[2] - noted.guides if video else samples, options, 2 if video else 0)
    count = shape[2] if video else len(frames)

    # the module is given 0 to 1000, of flow models too, some of which count from 0 to 1
    timesteps = (1000 * t if isinstance(sampling, CONST) else sampling.timestep(t))[:samples].float()
    timesteps = timesteps.expand(samples)
    sigma, *values = torch.cat([t[:1].float(), timesteps]).tolist()  # the one time that the device is waited for
    return Forward(sigma=torch.tensor(sigma), timesteps=tuple(values), at=timesteps, halves=halves, rows=shape[0],
                   latent=whole[-2:], size=tuple(shape[-2:]), frames=frames, count=count, total=total, dtype=dtype,
                   device=t.device, video=video, thread_device=options.get("multigpu_thread_device"))


def _halves(rows: int, noted: NotedConds, options: dict,
            context: torch.Tensor | None) -> tuple[tuple[Half, ...], int]:
    """(the halves in a batch of so many rows, samples of each)."""
    indices = options.get("cond_or_uncond") or [0]
    uuids = options.get("uuids") or [None] * len(indices)
    halves = tuple(noted.half(index, uuid) for index, uuid in zip(indices, uuids, strict=True))
    batch = _samples_of_half(noted, options) or rows

    rows_of_half, others = divmod(rows, len(halves))
    if not others and rows_of_half >= batch:
        # more rows than there are in the whole batch are those of several tiles, all halves of a tile together
        samples = rows_of_half if rows_of_half % batch else batch
        return halves * (rows_of_half // samples), samples

    # a pack's own call: fewer halves than noted, or more, which are copies of the last ones
    samples = batch if rows % batch == 0 else rows
    count = rows // samples
    if count > len(halves):
        return (*halves, *halves[-1:] * (count - len(halves))), samples
    return tuple(_half_of_prompt(half, noted, context, index * samples)
                 for index, half in enumerate(sorted(halves, key=lambda half: not half.positive)[:count])), samples


def _samples_of_half(noted: NotedConds, options: dict) -> int | None:
    """How many samples ComfyUI gives each half of a call at most: the whole batch, or its frames in a window."""
    window = window_of(options)
    if window is not None and window[2] == 0:
        return len(window[0])
    return noted.shape[0] if noted.shape else None


def _half_of_prompt(guess: Half, noted: NotedConds, context: torch.Tensor | None, row: int) -> Half:
    """The half whose prompt stands in this row of a call's context; the guess where none does, or there is none."""
    if context is None or len(context) <= row:
        return guess
    for half, prompt in noted.prompts:
        same = context[row, :prompt.shape[1]]
        if same.shape == prompt.shape[1:] and torch.equal(same, prompt[0].to(same)):
            return half
    return guess


def _frames(samples: int, options: dict, dim: int) -> tuple[tuple[int, ...], int]:
    """Which entries of the whole batch or video a half holds along dimension ``dim``, and how many there are in all."""
    window = window_of(options)
    if window is None:
        return tuple(range(samples)), samples

    frames, total, window_dim = window
    if window_dim != dim:
        raise ValueError(f"dim: the context windows of this controlled MODEL run over frames, dimension {dim}, but dim "
                         f"is {window_dim}; set dim to {dim} in Context Windows (Manual).")
    return frames, total


def window_of(options: dict) -> tuple[tuple[int, ...], int, int] | None:
    """(frames, how many there are in all, their dimension) of ComfyUI's or AnimateDiff's window, None outside one."""
    window = options.get("context_window")
    if window is not None:
        anchor = getattr(window, "causal_anchor_index", None)
        frames = list(window.index_list)
        return tuple(frames if anchor is None or anchor < 0 else [anchor, *frames]), window.total_frames, window.dim
    animatediff = options.get("ad_params") or {}
    if animatediff.get("sub_idxs") is not None:
        return tuple(animatediff["sub_idxs"]), animatediff["full_length"], 0
    return None
