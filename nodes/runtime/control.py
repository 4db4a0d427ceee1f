"""One control in one run: the features and weights that it gives to each call of the denoiser."""

import logging
import math

import comfy.model_management
import comfy.utils
import torch

from ...controlnext_core.cross_normalization import pool
from ...controlnext_core.features import control_features
from ...controlnext_core.sizes import crop, halved
from .forward import Forward, Half
from .images import Images
from .loaded import LoadedModule
from .resolve import Resolved
from .settings import Settings


class Control:
    """A control's settings, resolved for the model that runs. It lives as long as the run, and with it what it keeps.

    Args:
        row_by_row: there is an image for each row of the batch, guidance halves included.
        keeps: features and image parts are kept for when they are asked for again.

    Attributes:
        place: the Place at which its features enter.
        wanted: it had something to add in a call.
        taken: the denoiser got it in a call.
    """

    def __init__(self, settings: Settings, resolved: Resolved, row_by_row: bool = False, keeps: bool = True):
        self.settings, self.resolved, self.row_by_row, self.keeps = settings, resolved, row_by_row, keeps
        self.loaded = settings.controlnext.loaded
        self.place, self.sampling = resolved.place, resolved.sampling
        self.wanted = self.taken = False
        self.used = {self.loaded}
        self._images = Images(settings.image, resolved.ratio, settings.resize)
        self._mask_of_all = None if settings.mask is None or (settings.mask == 1).all() else settings.mask[:, None]
        self._masks: dict[tuple, torch.Tensor] = {}
        self._warned = False

    def __deepcopy__(self, memo) -> "Control":
        return self

    def __call__(self, forward: Forward) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(features, weights) for ``cross_normalization.add_controls``; None when this call goes uncontrolled."""
        factor = self.resolved.strength_at(forward.sigma)
        gains = tuple(factor * self.resolved.gains[0 if half.positive else 1] for half in forward.halves)
        if not any(gains):
            return None

        self.wanted = True
        groups = [(half.area, self._images_of(forward, index, half)) for index, half in enumerate(forward.halves)]
        computed = {group: self._features(forward, *group) for group in dict.fromkeys(groups)}
        if len(computed) == 1:
            features = computed[groups[0]][None]
        else:
            features = torch.stack([computed[group] for group in groups])
        return features, self._weights(forward, gains)

    def end_run(self) -> None:
        """Give back what only the run needed."""
        for loaded in self.used:
            loaded.end_run()

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
        """``LoadedModule.memory`` for a sampling of latents of this shape."""
        height, width = halved(shape[-2:], self.place.halvings)
        images = len(self.settings.image)
        frames = min(shape[2], images) if len(shape) == 5 and shape[2] > 1 else images
        pixels = self.resolved.ratio ** 2 * math.prod(shape[-2:])
        return self.loaded.memory(images, pixels, height * width, self.resolved.family.stem_pool, dtype, frames)

    def _images_of(self, forward: Forward, index: int, half: Half) -> tuple[tuple[int, ...], ...]:
        """Which images control each sample or latent frame of a half; of equal ones the first."""
        count = len(self.settings.image)
        if self.row_by_row:
            groups = [(row,) for row in range(index * forward.count, (index + 1) * forward.count)]
        else:
            frames = forward.frames_of(half)
            frames = (0, *frames[1:]) if self.resolved.window_reference else frames
            groups = [images_of(frame, self._images_a_frame(forward)) for frame in frames]
            total = self._images_a_frame(forward) * (forward.total - 1) + 1
            if count not in (1, total) and not self._warned:
                self._warned = True
                logging.warning("ControlNeXt: %d control images for a %s of %d; they are %s.", count,
                                "video" if forward.video else "batch", total,
                                "cut" if count > total else "repeated from the first on")
        groups = [tuple(self._images.first_like(index % count) for index in group) for group in groups]
        return tuple(group if len(set(group)) > 1 else group[:1] for group in groups)

    def _images_a_frame(self, forward: Forward) -> int:
        return self.place.images if forward.video else 1

    def _features(self, forward: Forward, area: tuple[int, int, int, int] | None,
                  images: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        """Standardized features (1 or samples, C, H, W) at the denoiser's size, each image and timestep computed once.

        Frames of a video are put below one another.
        """
        rows = [0] * len(images) if forward.video else range(len(images))
        wanted = [(group, self._timestep(forward, row)) for group, row in zip(images, rows, strict=True)]
        row_of = dict(zip(reversed(wanted), reversed(rows), strict=True))
        computed = {one: self._features_of(one[0], row, forward, area) for one, row in row_of.items()}
        if len(computed) == 1 and not forward.video:
            return computed[wanted[0]]
        return torch.cat([computed[one] for one in wanted], 2 if forward.video else 0)

    def _timestep(self, forward: Forward, row: int) -> float | None:
        """The one that a row's features are of, None where they are of every timestep."""
        return forward.timesteps[row] if self.loaded.patcher.model.timed else None

    def _features_of(self, images: tuple[int, ...], row: int, forward: Forward, area) -> torch.Tensor:
        """Features of images that share a latent frame (mostly one), their mean standardized, at one timestep.

        Images go one by one, so that no result depends on its batch.
        """
        family = self.resolved.family
        loaded = self._loaded_on(forward.thread_device)
        size = halved(forward.size, self.place.halvings)
        fitted = self.settings.fits_areas and area is not None and not self._images.has_size(forward.latent)
        fit_to = area[:2] if fitted else None
        resize = None if self._images.has_size(forward.latent) else self.settings.resize
        timestep = self._timestep(forward, row)
        where = (forward.latent, self.resolved.ratio, area, fitted, resize, family.name, forward.dtype, forward.device,
                 torch.is_inference_mode_enabled())  # training cannot use inference's tensors

        def image_part(index: int):
            picture = self._images.keep(index, forward.latent, fit_to)
            if area is not None and not fitted:
                picture = crop(picture, area, self.resolved.ratio)
            picture = picture.to(forward.device, forward.dtype)
            return loaded.patcher.model.image_part(picture, family.stem_padding, family.stem_pool)

        def kept_image_part(index: int):
            pixels = math.prod(forward.size) * self.resolved.ratio ** 2
            count = len(self.settings.image)
            if self.keeps and loaded.image_parts_stay(count, pixels, family.stem_pool, forward.dtype):
                return loaded.image_parts.get((self._images.digest(index), *where), lambda: image_part(index))
            return image_part(index)  # a video is too large: too few would stay to be worth their memory

        def features():
            at = forward.at[row:row + 1]
            return (control_features(loaded.patcher.model, family, map(kept_image_part, images), at, size),)

        def key():
            return tuple(map(self._images.digest, images)), *where, timestep, size

        if not self.keeps:
            return features()[0]
        if not loaded.features.holds(key()):
            for index in images:  # the digests are now those of the pictures that features come from
                self._images.keep(index, forward.latent, fit_to)
        try:
            return loaded.features.get(key(), features, step=timestep)[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        logging.warning("ControlNeXt: memory ran out; control frees what it keeps on the device and tries once more.")
        loaded.free_device()  # out here, where the exception's frames hold nothing any more
        comfy.model_management.soft_empty_cache()
        return loaded.features.get(key(), features, step=timestep)[0]

    def _loaded_on(self, device: torch.device | None) -> LoadedModule:
        """The module for a thread's device, None for the only one; with several GPUs, each has a copy."""
        loaded = self.loaded.on_device(device)
        self.used.add(loaded)
        return loaded

    def _weights(self, forward: Forward, gains: tuple[float, ...]) -> torch.Tensor:
        """Multipliers (halves, samples or 1, 1, H or 1, W or 1): the half's gain times the mask."""
        mask = self._mask(forward).expand(len(gains), -1, -1, -1, -1)
        if len(set(gains)) == 1:
            return mask * gains[0]
        return torch.cat([one * gain for one, gain in zip(mask.split(1), gains, strict=True)])

    def _mask(self, forward: Forward) -> torch.Tensor:
        """The mask (halves or 1, samples or 1, 1, H or 1, W or 1) for the places of a call's batch, made once a run."""
        size = halved(forward.size, self.place.halvings)
        key = (forward.halves, forward.frames, forward.latent, size, forward.dtype, forward.device)
        if self._mask_of_all is None:
            key = (forward.dtype, forward.device)
        if key not in self._masks:
            made = (torch.ones(1, 1, 1, 1, 1) if self._mask_of_all is None else
                    torch.stack([self._mask_of(forward, half, size) for half in forward.halves]))
            self._masks[key] = made.to(forward.device, forward.dtype)
        return self._masks[key]

    def _mask_of(self, forward: Forward, half: Half, size: tuple[int, int]) -> torch.Tensor:
        """A half's mask (samples or 1, 1, H, W); frames of a video are put below one another."""
        latent = (forward.latent[1], forward.latent[0])
        mask = comfy.utils.common_upscale(self._mask_of_all, *latent, "area", "disabled")
        if len(mask) > 1 or forward.video:
            groups = [images_of(frame, self._images_a_frame(forward)) for frame in forward.frames_of(half)]
            mask = torch.stack([mask[[index % len(mask) for index in group]].mean(0) for group in groups])

        mask = pool(mask if half.area is None else crop(mask, half.area, 1), size)
        return torch.cat(list(mask), 1)[None] if forward.video else mask


def images_of(frame: int, images: int) -> range:
    """Which images a latent frame of a video stands for: the first one of all for one, others for so many."""
    return range(max(images * (frame - 1) + 1, 0), images * frame + 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, however torch raised it."""
    if hasattr(comfy.model_management, "is_oom"):  # not in the oldest ComfyUI
        return comfy.model_management.is_oom(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)
