"""Control images and masks as nodes get them: checked, and for one run as they were when they were first needed."""

import hashlib
import logging

import comfy.utils
import torch
import torch.nn.functional as F

from ...controlnext_core.sizes import as_rgb

RESIZING = "lanczos"  # control images are resized so, as in the reference
RESIZES = ("stretch", "crop", "pad")
CHANNELS = (1, 2, 3, 4)  # gray, gray with alpha, RGB, RGBA


def checked_image(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """An IMAGE (N, H, W, C) as it is.

    Raises:
        ValueError: it holds no picture, has other dimensions, or no floating point numbers.
    """
    found = "x".join(map(str, image.shape))
    if image.ndim != 4 or image.shape[-1] not in CHANNELS:
        raise ValueError(f"{name}: pictures, height, width and 1 to 4 channels are expected, in this order, but what "
                         f"is connected is {found or 'a single number'}; check the node that made it.")
    if 0 in image.shape:
        raise ValueError(f"{name}: what is connected is {found} (pictures, height, width, channels), so there is no "
                         f"picture in it; check the node that made it.")
    if not image.is_floating_point():
        raise ValueError(f"{name}: it holds {str(image.dtype).removeprefix('torch.')} numbers where numbers from 0 to "
                         "1 are expected; check the node that made it.")
    return image


def checked_mask(mask: torch.Tensor, name: str = "mask") -> torch.Tensor:
    """A MASK (H, W), (M, H, W) or (M, 1, H, W) as (M, H, W) floating point numbers, of truth values 0 and 1.

    Raises:
        ValueError: it has other dimensions, holds nothing, no numbers from 0 to 1, or values that are not finite.
    """
    found = "x".join(map(str, mask.shape))
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise ValueError(f"{name}: masks, height and width are expected, in this order, but what is connected is "
                         f"{found or 'a single number'}; Convert Image to Mask makes a mask of an image.")
    if 0 in mask.shape:
        raise ValueError(f"{name}: what is connected is {found} (masks, height, width), so there is no mask in it; "
                         "check the node that made it.")
    if mask.dtype == torch.bool:
        return mask.float()
    if not mask.is_floating_point():
        raise ValueError(f"{name}: it holds {str(mask.dtype).removeprefix('torch.')} numbers where numbers from 0 to 1 "
                         "are expected; check the node that made it.")
    if not torch.isfinite(mask).all():
        raise ValueError(f"{name}: the mask holds NaN or infinite values; check the node that made it.")
    return mask.float()


def control_image(image: torch.Tensor) -> torch.Tensor:
    """A control image (N, H, W, C) as (N, H, W, 3) float32. ValueError: values not finite, and as ``checked_image``."""
    if not torch.isfinite(checked_image(image)).all():
        raise ValueError("image: the control image holds NaN or infinite values; check the node that made it.")
    return as_rgb(image).float()


class Images:
    """The control images of one run, as they are when they are first needed.

    Another node may change a picture in place at any time. What is computed from it is kept under its digest, so the
    digest is taken from a copy, and the copy is what features are computed from.

    Args:
        image: (N, H, W, C) in [0, 1].
        ratio: pixels that one latent pixel stands for.
        resize: as in ``resized``.
    """

    def __init__(self, image: torch.Tensor, ratio: int, resize: str):
        self._image, self._ratio, self._resize = checked_image(image), ratio, resize
        self._digests: dict[int, str] = {}
        self._firsts: dict[str, int] = {}
        self._kept: dict[tuple[int, int, int], dict[int, torch.Tensor]] = {}

    def has_size(self, latent: tuple[int, int]) -> bool:
        """Whether the images are as large as a picture of this latent (H, W)."""
        return tuple(self._image.shape[1:3]) == self._pixels(latent)

    def digest(self, index: int) -> str:
        """The digest of an image's shape and values."""
        if index not in self._digests:
            self._digests[index] = digest_of(control_image(self._image[index:index + 1])[0])
        return self._digests[index]

    def first_like(self, index: int) -> int:
        """The first image that was asked for with the same values."""
        return self._firsts.setdefault(self.digest(index), index)

    def keep(self, index: int, latent: tuple[int, int], fit_to: tuple[int, int] | None = None) -> torch.Tensor:
        """A copy (1, 3, H, W) of an image for the run, as large as a picture of this latent (H, W) or of ``fit_to``."""
        kept = self._kept.setdefault((*latent, fit_to), {})
        if index not in kept:
            image = control_image(self._image[index:index + 1]).clone()
            self._digests[index] = digest_of(image[0])
            height, width = self._pixels(fit_to or latent)
            if not kept and image.shape[1:3] != (height, width):
                logging.info("ControlNeXt: the control image is resized from %dx%d to %dx%d.",
                             image.shape[2], image.shape[1], width, height)
            kept[index] = resized(image.movedim(-1, 1), height, width, self._resize)
        return kept[index]

    def _pixels(self, latent: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in pixels of a latent's."""
        return latent[0] * self._ratio, latent[1] * self._ratio


def resized(image: torch.Tensor, height: int, width: int, resize: str = "stretch") -> torch.Tensor:
    """An image (N, C, h, w) at another size, with Lanczos; the same when it has that size already.

    Args:
        resize: stretch fills the size, as the reference does; crop fills it with the middle of the image, as ComfyUI's
            ControlNets do; pad puts the whole image into it, on black.
    """
    if image.shape[-2:] == (height, width):
        return image
    if resize != "pad":
        crop = "center" if resize == "crop" else "disabled"
        return comfy.utils.common_upscale(image, width, height, RESIZING, crop)

    scale = min(height / image.shape[-2], width / image.shape[-1])
    inner = [max(1, round(side * scale)) for side in image.shape[-2:]]
    inside = comfy.utils.common_upscale(image, inner[1], inner[0], RESIZING, "disabled")
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    return F.pad(inside, (left, width - inner[1] - left, top, height - inner[0] - top))


def digest_of(image: torch.Tensor) -> str:
    """The digest of the shape and the values of one image (H, W, C)."""
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode())
    digest.update(image.contiguous().cpu().numpy())
    return digest.hexdigest()
