"""One call of ComfyUI's denoiser, decoded: which guidance halves, frames and areas its rows are."""

from dataclasses import dataclass

import torch
from comfy.model_sampling import CONST

CONDS_KEY = "controlnext_conds"


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
    """What all controls need to know of one call of the UNet.

    Attributes:
        sigma: noise level of the call.
        timesteps: the UNet's own timestep for each sample of a half.
        halves: the guidance halves in the batch, in order; all of them again for each tile of a tiled picture.
        latent: (H, W) of the whole latent.
        size: (H, W) of the latent in this call, smaller than ``latent`` for a regional cond.
        frames: for each sample of a half, its place in the whole batch or video; of a video in a latent of its own, for
            each latent frame, those before a half's ``start`` too.
        count: samples of a half, or latent frames.
        total: samples of the whole batch or video.
        dtype, device: of the UNet's features.
        video: the latents are videos, and all samples share the frames.
    """

    sigma: float
    timesteps: tuple[float, ...]
    halves: tuple[Half, ...]
    latent: tuple[int, int]
    size: tuple[int, int]
    frames: tuple[int, ...]
    count: int
    total: int
    dtype: torch.dtype
    device: torch.device
    video: bool = False

    def frames_of(self, half: Half) -> tuple[int, ...]:
        """Those of ``frames`` that are a half's."""
        return self.frames[half.start:half.start + self.count]


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
