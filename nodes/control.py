"""One Apply ControlNeXt: what it asks for, and the features and weights that it gives to one forward of the UNet."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.utils
import torch

from ..controlnext_core.cross_normalization import fit, pool
from ..controlnext_core.families import Family
from ..controlnext_core.sizes import crop, halved
from .model import ControlNeXt
from .places import Place


@dataclass(frozen=True)
class Half:
    """One guidance half of a batch: is it positive, and which (height, width, top, left) of the latent is it for."""

    positive: bool
    area: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Forward:
    """What all controls need to know of one call of the UNet.

    Attributes:
        sigma: noise level of the call.
        timesteps: the UNet's own timestep for each sample of a half.
        halves: the guidance halves in the batch, in order.
        latent: (H, W) of the whole latent.
        size: (H, W) of the latent in this call, smaller than ``latent`` for a regional cond.
        frames: for each sample of a half, its place in the whole batch or video.
        total: samples of the whole batch or video.
        dtype, device: of the UNet's features.
    """

    sigma: float
    timesteps: tuple[float, ...]
    halves: tuple[Half, ...]
    latent: tuple[int, int]
    size: tuple[int, int]
    frames: tuple[int, ...]
    total: int
    dtype: torch.dtype
    device: torch.device


class Control:
    """One ControlNeXt with its image and settings, ready to serve any forward.

    Args:
        controlnext: the loaded model.
        family: its entry of the families' table, settled for the connected MODEL.
        place: where its features enter.
        image: (N, H, W, 3) in [0, 1].
        mask: (M, H, W) in [0, 1] or None.
        gains: multipliers of the positive and of the other guidance halves.
        sigmas: (first, last) noise level between which control acts.
        ratio: pixels of the image that one latent pixel stands for.
        window_reference: the first frame of every context window is controlled by the first image.
        over_time: noise level -> factor of the gains, or None.
    """

    def __init__(self, controlnext: ControlNeXt, family: Family, place: Place, image: torch.Tensor,
                 mask: torch.Tensor | None, gains: tuple[float, float], sigmas: tuple[float, float], ratio: int,
                 window_reference: bool, over_time: Callable[[float], float] | None = None):
        self.loaded = controlnext.loaded
        self.patcher = controlnext.patcher
        self.family = family
        self.place = place
        self.image = image.movedim(-1, 1)
        self.fingerprints = [_fingerprint(one) for one in image]
        self.mask = None if mask is None else mask[:, None]
        self.gains = gains
        self.sigmas = sigmas
        self.ratio = ratio
        self.window_reference = window_reference
        self.over_time = over_time
        self._resized: torch.Tensor | None = None
        self._warned = False

    def __call__(self, forward: Forward) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(features, weights) for ``cross_normalization.add_controls``; None when this forward goes uncontrolled."""
        factor = 1.0 if self.over_time is None else self.over_time(forward.sigma)
        gains = [factor * self.gains[0 if half.positive else 1] for half in forward.halves]
        if not self.sigmas[1] <= forward.sigma <= self.sigmas[0] or not any(gains):
            return None
        areas = dict.fromkeys(half.area for half in forward.halves)
        by_area = {area: self._features(forward, area) for area in areas}
        if len(areas) == 1:
            features = by_area[forward.halves[0].area][None]
        else:
            features = torch.stack([by_area[half.area] for half in forward.halves])
        return features, self._weights(forward, gains)

    def end_run(self) -> None:
        """Give back what only a running sampling needs."""
        self.loaded.image_parts.clear()
        self.loaded.features.end_run()

    def _features(self, forward: Forward, area: tuple[int, int, int, int] | None) -> torch.Tensor:
        """Standardized features (1 or samples, C, H, W) at the UNet's size, each image and timestep computed once."""
        frames = (0, *forward.frames[1:]) if self.window_reference else forward.frames
        wanted = [(frame % len(self.image), timestep)
                  for frame, timestep in zip(frames, forward.timesteps, strict=True)]
        if len(self.image) not in (1, forward.total) and not self._warned:
            self._warned = True
            logging.warning("Apply ControlNeXt: %d control images for a batch of %d; they are %s.", len(self.image),
                            forward.total, "cut" if len(self.image) > forward.total else "repeated from the first on")
        computed = {pair: self._features_of(*pair, forward, area) for pair in dict.fromkeys(wanted)}
        if len(computed) == 1:
            return computed[wanted[0]]
        return torch.cat([computed[pair] for pair in wanted])

    def _features_of(self, index: int, timestep: float, forward: Forward, area) -> torch.Tensor:
        """Features of one image at one timestep: images go one by one, so that no result depends on its batch."""
        family, module = self.family, self.patcher.model
        size = halved(forward.size, self.place.halvings)
        image_key = (self.fingerprints[index], forward.latent, self.ratio, area, family.name, forward.dtype,
                     forward.device, torch.is_inference_mode_enabled())  # training cannot use inference's tensors

        def image_part():
            image = self._at_size(forward.latent)[index:index + 1]
            if area is not None:
                image = crop(image, area, self.ratio)
            return module.image_part(image.to(forward.device, forward.dtype), family.stem_padding, family.stem_pool)

        def features():
            if self._image_part_bytes(forward) <= self.loaded.image_parts.limit:
                part = self.loaded.image_parts.get(image_key, image_part)
            else:  # of a video, too few would stay to be worth their memory
                part = image_part()
            at = torch.tensor([timestep], device=forward.device)
            control = module.timestep_part(part, at, size if family.pool_first else None)
            return (fit(control, size, family.pool_first, family.eps),)

        return self.loaded.features.get((*image_key, timestep, size), features)[0]

    def _image_part_bytes(self, forward: Forward) -> int:
        """Upper bound of the image parts of all images of this control."""
        width = self.patcher.model.down_res[0].conv1.out_channels
        pixels = forward.size[0] * forward.size[1] * self.ratio ** 2
        stem = 1 if self.patcher.model.embedding is None else 4
        return len(self.image) * 2 * width * pixels // stem * forward.dtype.itemsize

    def _at_size(self, latent: tuple[int, int]) -> torch.Tensor:
        """The control images (N, 3, H, W) at the sampled image's size, stretched with Lanczos as the reference does."""
        height, width = latent[0] * self.ratio, latent[1] * self.ratio
        if self.image.shape[-2:] == (height, width):
            return self.image
        resized = self._resized  # held: another thread may exchange it
        if resized is None or resized.shape[-2:] != (height, width):
            logging.info("Apply ControlNeXt: the control image is resized from %dx%d to %dx%d.",
                         self.image.shape[-1], self.image.shape[-2], width, height)
            resized = self._resized = comfy.utils.common_upscale(self.image, width, height, "lanczos", "disabled")
        return resized

    def _weights(self, forward: Forward, gains: list[float]) -> torch.Tensor:
        """Multipliers (halves, samples or 1, 1, H or 1, W or 1): the half's gain times the mask."""
        gain = torch.tensor(gains, device=forward.device, dtype=forward.dtype).reshape(-1, 1, 1, 1, 1)
        if self.mask is None:
            return gain
        mask = comfy.utils.common_upscale(self.mask, forward.latent[1], forward.latent[0], "area", "disabled")
        mask = mask[[frame % len(mask) for frame in forward.frames]] if len(mask) > 1 else mask
        size = halved(forward.size, self.place.halvings)
        masks = [pool(mask if half.area is None else crop(mask, half.area, 1), size) for half in forward.halves]
        return gain * torch.stack(masks).to(forward.device, forward.dtype)


def _fingerprint(image: torch.Tensor) -> str:
    """Digest of one image (H, W, C): its shape and its values."""
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode())
    digest.update(image.contiguous().cpu().numpy())
    return digest.hexdigest()
