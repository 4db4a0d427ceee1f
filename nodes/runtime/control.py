"""One control: what it asks for, and the features and weights that it gives to one forward of the UNet."""

import hashlib
import logging
import math
from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch

from ...controlnext_core.cross_normalization import fit, pool
from ...controlnext_core.families import Family
from ...controlnext_core.sizes import as_rgb, crop, halved
from .forward import Forward, Half
from .loaded import ControlNeXt, LoadedModule
from .places import Place

RESIZING = "lanczos"  # of control images, as the reference does


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
        fits_areas: for a cond with an area, an image that is not as large as the picture is fitted into the area, as
            ComfyUI's own ControlNets do; without it the area gets its part of the image.
        row_by_row: there is an image for each row of the batch, guidance halves included.
    """

    def __init__(self, controlnext: ControlNeXt, family: Family, place: Place, image: torch.Tensor,
                 mask: torch.Tensor | None, gains: tuple[float, float], sigmas: tuple[float, float], ratio: int,
                 window_reference: bool, over_time: Callable[[float], float] | None = None, fits_areas: bool = False,
                 row_by_row: bool = False):
        self.loaded = controlnext.loaded
        self.patcher = controlnext.patcher
        self.family = family
        self.place = place
        self.image = image.movedim(-1, 1)
        self.fingerprints = [_fingerprint(one) for one in image]
        self._first = {fingerprint: index for index, fingerprint in reversed(list(enumerate(self.fingerprints)))}
        self.mask = None if mask is None else mask[:, None]
        self.gains = gains
        self.sigmas = sigmas
        self.ratio = ratio
        self.window_reference = window_reference
        self.over_time = over_time
        self.fits_areas = fits_areas
        self.row_by_row = row_by_row
        self._resized: torch.Tensor | None = None
        self._warned = False

    def __call__(self, forward: Forward) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(features, weights) for ``cross_normalization.add_controls``; None when this forward goes uncontrolled."""
        factor = 1.0 if self.over_time is None else self.over_time(forward.sigma)
        gains = [factor * self.gains[0 if half.positive else 1] for half in forward.halves]
        if not self.sigmas[1] <= forward.sigma <= self.sigmas[0] or not any(gains):
            return None
        wanted = [(half.area, self._images(forward, index, half)) for index, half in enumerate(forward.halves)]
        computed = {one: self._features(forward, *one) for one in dict.fromkeys(wanted)}
        if len(computed) == 1:
            features = computed[wanted[0]][None]
        else:
            features = torch.stack([computed[one] for one in wanted])
        return features, self._weights(forward, gains)

    def _images(self, forward: Forward, index: int, half: Half) -> tuple[tuple[int, ...], ...]:
        """Which images control each sample or latent frame of a half; of equal ones the first."""
        if self.row_by_row:
            groups = [(row,) for row in range(index * forward.count, (index + 1) * forward.count)]
        else:
            frames = forward.frames_of(half)
            frames = (0, *frames[1:]) if self.window_reference else frames
            groups = [images_of(frame, self._images_a_frame(forward)) for frame in frames]
            total = self._images_a_frame(forward) * (forward.total - 1) + 1
            if len(self.image) not in (1, total) and not self._warned:
                self._warned = True
                logging.warning("ControlNeXt: %d control images for a %s of %d; they are %s.", len(self.image),
                                "video" if forward.video else "batch", total,
                                "cut" if len(self.image) > total else "repeated from the first on")
        groups = [tuple(self._first[self.fingerprints[index % len(self.image)]] for index in group) for group in groups]
        return tuple(group if len(set(group)) > 1 else group[:1] for group in groups)

    def _images_a_frame(self, forward: Forward) -> int:
        return self.place.images if forward.video else 1

    def _features(self, forward: Forward, area: tuple[int, int, int, int] | None,
                  images: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        """Standardized features (1 or samples, C, H, W) at the UNet's size, each image and timestep computed once.

        Frames of a video are put below one another.
        """
        timesteps = forward.timesteps[:1] * len(images) if forward.video else forward.timesteps
        wanted = list(zip(images, timesteps, strict=True))
        computed = {pair: self._features_of(*pair, forward, area) for pair in dict.fromkeys(wanted)}
        if len(computed) == 1 and not forward.video:
            return computed[wanted[0]]
        return torch.cat([computed[pair] for pair in wanted], 2 if forward.video else 0)

    def _features_of(self, images: tuple[int, ...], timestep: float, forward: Forward, area) -> torch.Tensor:
        """Features of images that share a latent frame (mostly one), their mean standardized, at one timestep.

        Images go one by one, so that no result depends on its batch.
        """
        family, module = self.family, self.patcher.model
        size = halved(forward.size, self.place.halvings)
        fitted = self.fits_areas and area is not None and self.image.shape[-2:] != self._pixels(forward.latent)
        where = (forward.latent, self.ratio, area, fitted, family.name, forward.dtype, forward.device,
                 torch.is_inference_mode_enabled())  # training cannot use inference's tensors

        def image_part(index):
            if fitted:
                height, width = self._pixels(area[:2])
                image = comfy.utils.common_upscale(self.image[index:index + 1], width, height, RESIZING, "center")
            else:
                image = self._at_size(forward.latent)[index:index + 1]
                if area is not None:
                    image = crop(image, area, self.ratio)
            return module.image_part(image.to(forward.device, forward.dtype), family.stem_padding, family.stem_pool)

        def raw(index):
            if self.loaded.image_parts_stay(len(self.image), math.prod(self._pixels(forward.size)), forward.dtype):
                part = self.loaded.image_parts.get((self.fingerprints[index], *where), lambda: image_part(index))
            else:  # of a video, too few would stay to be worth their memory
                part = image_part(index)
            at = torch.tensor([timestep], device=forward.device)
            return module.timestep_part(part, at, size if family.pool_first else None)

        def features():
            control = raw(images[0]) if len(images) == 1 else sum(map(raw, images)) / len(images)
            return (fit(control, size, family.pool_first, family.eps),)

        key = (tuple(self.fingerprints[index] for index in images), *where, timestep, size)
        try:
            return self.loaded.features.get(key, features, step=timestep)[0]
        except comfy.model_management.OOM_EXCEPTION:
            pass  # to let go of what the exception's frames hold
        logging.warning("ControlNeXt: memory ran out; what is kept on the device is given up, and one more try made.")
        self.loaded.free_device()
        comfy.model_management.soft_empty_cache()
        return self.loaded.features.get(key, features, step=timestep)[0]

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """``memory_of`` for a sampling of latents of this shape."""
        return memory_of(self.loaded, self.family, self.place, len(self.image), self.ratio, shape, dtype)

    def _at_size(self, latent: tuple[int, int]) -> torch.Tensor:
        """The control images (N, 3, H, W) at the sampled image's size, stretched with Lanczos as the reference does."""
        height, width = self._pixels(latent)
        if self.image.shape[-2:] == (height, width):
            return self.image
        resized = self._resized  # held: another thread may exchange it
        if resized is None or resized.shape[-2:] != (height, width):
            logging.info("ControlNeXt: the control image is resized from %dx%d to %dx%d.",
                         self.image.shape[-1], self.image.shape[-2], width, height)
            resized = self._resized = comfy.utils.common_upscale(self.image, width, height, RESIZING, "disabled")
        return resized

    def _pixels(self, latent: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in pixels of a latent's."""
        return latent[0] * self.ratio, latent[1] * self.ratio

    def _weights(self, forward: Forward, gains: list[float]) -> torch.Tensor:
        """Multipliers (halves, samples or 1, 1, H or 1, W or 1): the half's gain times the mask."""
        gain = torch.tensor(gains, device=forward.device, dtype=forward.dtype).reshape(-1, 1, 1, 1, 1)
        if self.mask is None:
            return gain
        mask = comfy.utils.common_upscale(self.mask, forward.latent[1], forward.latent[0], "area", "disabled")
        size = halved(forward.size, self.place.halvings)

        def mask_of(half: Half) -> torch.Tensor:
            whole = mask
            if len(mask) > 1 or forward.video:
                groups = [images_of(frame, self._images_a_frame(forward)) for frame in forward.frames_of(half)]
                whole = torch.stack([mask[[index % len(mask) for index in group]].mean(0) for group in groups])
            return pool(whole if half.area is None else crop(whole, half.area, 1), size)
        masks = [mask_of(half) for half in forward.halves]
        if forward.video:
            masks = [torch.cat(list(mask), 1)[None] for mask in masks]
        return gain * torch.stack(masks).to(forward.device, forward.dtype)


def memory_of(loaded: LoadedModule, family: Family, place: Place, images: int, ratio: int, shape: tuple[int, ...],
              dtype: torch.dtype) -> tuple[int, int]:
    """``LoadedModule.memory`` of so many control images, for a sampling of latents of this shape."""
    height, width = halved(shape[-2:], place.halvings)
    frames = min(shape[2], images) if len(shape) == 5 and shape[2] > 1 else images
    return loaded.memory(images, ratio ** 2 * math.prod(shape[-2:]), height * width, family.stem_pool, dtype, frames)


def images_of(frame: int, images: int) -> range:
    """Which images a latent frame of a video stands for: the first one of all for one, others for so many."""
    return range(max(images * (frame - 1) + 1, 0), images * frame + 1)


def control_image(image: torch.Tensor) -> torch.Tensor:
    """A control image as users connect it, (N, H, W, C), as (N, H, W, 3) float32. ValueError: values not finite."""
    if not torch.isfinite(image).all():
        raise ValueError("image: the control image holds NaN or infinite values; check the node that made it.")
    return as_rgb(image).float()


def _fingerprint(image: torch.Tensor) -> str:
    """Digest of one image (H, W, C): its shape and its values."""
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode())
    digest.update(image.contiguous().cpu().numpy())
    return digest.hexdigest()
