"""The samples of a training: latents, captions and control images of ComfyUI's dataset nodes, row by row."""

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch

from ...controlnext_core.sentences import quoted
from ...controlnext_core.sizes import as_rgb
from ..runtime.images import checked_image


class Samples:
    """Latents, conditionings and control images that belong together, and batches of them.

    A sample is a picture, or a video with all its frames: then each IMAGE is a sample's control.

    Resolution Bucket regroups its latents and conditionings by size, sizes in the order in which they first appear. All
    three lists are put into that order here, so that they match with and without that node.

    Args:
        latents: LATENTs of any batch sizes.
        conditioning: CONDITIONINGs with one entry per sample in all, per LATENT, or one entry for all.
        images: control images, one for each picture or frame, each as large as that.
        empty: CONDITIONING of an empty prompt, for dropped captions, or None.
        ratio: pixels of a picture that one latent pixel stands for.
        rows_are_frames: each LATENT is a video, a frame a row; otherwise a row is a sample.
        images_a_frame: control images that a latent frame of a video stands for, the first one of all for one; 1 for
            a MODEL of pictures alone.
        channels: the number that the MODEL's latents have; None takes any.

    Attributes:
        videos: there are videos among the samples.

    Raises:
        ValueError: their numbers or sizes do not match, or one of them is none or not finite; one sentence that names
            the input.
    """

    def __init__(self, latents: list[dict], conditioning: list, images: list[torch.Tensor], empty: list | None,
                 ratio: int, rows_are_frames: bool = False, images_a_frame: int = 1, channels: int | None = None):
        batches = [latent["samples"] for latent in latents]
        for batch in batches:
            _check_latent(batch, images_a_frame, channels)
        for image in images:
            _check_finite("images", "a control image", checked_image(image, "images"))
        self.images_a_frame = images_a_frame
        self.latents = batches if rows_are_frames else [one for batch in batches for one in batch.split(1)]
        self.videos = rows_are_frames or any(_size(latent)[0] > 1 for latent in self.latents)
        self.images = images if self.videos else [one for batch in images for one in batch.split(1)]
        self.captions = [entry for entries in conditioning for entry in entries]
        if not rows_are_frames and len(self.captions) == len(batches):
            self.captions = [entry for entry, batch in zip(self.captions, batches, strict=True) for _ in batch]
        self.empty = empty
        self.ratio = ratio
        count = len(self.latents)
        if not count:
            raise ValueError("latents: there are none; connect Make Training Dataset or VAE Encode.")
        if len(self.images) != count:
            what, each = ("control images", "control image for each picture")
            if self.videos:
                what, each = ("batches of control images", "batch with an image for each frame of each video")
            raise ValueError(f"images: there are {len(self.images)} {what} for {count} latents; connect one {each}, in "
                             "the same order.")
        if len(self.captions) not in (1, count):
            raise ValueError(f"conditioning: there are {len(self.captions)} captions for {count} latents; connect one "
                             f"for each {'video' if self.videos else 'picture or LATENT'}, or one for all.")
        for caption in self.captions:
            _check_caption("conditioning", caption)
        if empty is not None:
            if not empty:
                raise ValueError("empty_conditioning: it holds no caption; connect an encoded empty prompt.")
            _check_caption("empty_conditioning", empty[0])
        order = [row for bucket in self.buckets() for row in bucket]
        self.captions = [self.captions[row % len(self.captions)] for row in order]
        self.images = [self.images[row] for bucket in _alike([self._latent_size(one) for one in self.images])
                       for row in bucket]
        self.latents = [self.latents[row] for row in order]
        for latent, image in zip(self.latents, self.images, strict=True):
            if self._latent_size(image)[0] != _size(latent)[0]:
                raise ValueError(f"images: there are {len(image)} control images for a video of "
                                 f"{self._frames(latent)} frames; connect one for each frame.")
            if self._latent_size(image) != _size(latent):
                height, width = (side * ratio for side in latent.shape[-2:])
                raise ValueError(f"images: a control image is {image.shape[2]}x{image.shape[1]} where its picture is "
                                 f"{width}x{height}; resize and crop control images exactly as the pictures.")

    def _frames(self, latent: torch.Tensor) -> int:
        """Frames of a video, of which a latent has fewer."""
        return self.images_a_frame * (_size(latent)[0] - 1) + 1

    def _latent_size(self, image: torch.Tensor) -> tuple[int, int, int]:
        """Of a sample's control; frames that fill no latent frame are left out, as the VAE does."""
        frames = (len(image) - 1) // self.images_a_frame + 1
        return frames, image.shape[1] // self.ratio, image.shape[2] // self.ratio

    def buckets(self) -> list[list[int]]:
        """Indices of the samples, those of one size together."""
        return _alike([_size(latent) for latent in self.latents])

    def batch_latents(self, rows: list[int]) -> torch.Tensor:
        """(B, C, h, w) or (B, C, F, h, w), float32, as the VAE made them; B is all frames of videos in rows."""
        return torch.cat([self.latents[row] for row in rows]).float()

    def batch_images(self, rows: list[int]) -> torch.Tensor:
        """(B, 3, H, W), float32 in [0, 1], cropped to what the VAE sees of a picture; B is all frames of videos."""
        images = [as_rgb(self.images[row][:self._frames(self.latents[row])]) for row in rows]
        return torch.cat([self._cropped(image) for image in images]).float().movedim(-1, 1)

    def _cropped(self, image: torch.Tensor) -> torch.Tensor:
        height, width = (side * self.ratio for side in self._latent_size(image)[1:])
        top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
        return image[:, top:top + height, left:left + width]

    def batch_conds(self, base_model, rows: list[int], dropped: list[bool], device) -> dict[str, torch.Tensor]:
        """Keyword arguments of ``base_model.apply_model``: one row of each for one row of ``batch_latents``.

        Args:
            dropped: which rows take the empty caption.
        """
        conds = []
        for row, drop in zip(rows, dropped, strict=True):
            entry = self.empty[0] if drop else self.captions[row]
            cond = comfy.samplers.encode_model_conds(
                base_model.extra_conds, comfy.sampler_helpers.convert_cond([entry]), self.latents[row], device,
                "positive")[0]
            conds.append({name: value.process_cond(batch_size=len(self.latents[row]), area=None, device=device)
                          for name, value in cond["model_conds"].items()})
        for name, value in conds[0].items():  # others are repeated to one length
            if type(value) is comfy.conds.CONDRegular and len({cond[name].cond.shape for cond in conds}) > 1:
                raise ValueError("conditioning: captions of one batch have different lengths, which this MODEL cannot "
                                 "take at once; set batch_size to 1 or make all captions short.")
        return {name: value.to(device) if torch.is_tensor(value) else value
                for name, value in comfy.samplers.cond_cat(conds).items()}


def _check_latent(batch: torch.Tensor, images_a_frame: int, channels: int | None) -> None:
    # some VAEs see a picture as a short video
    if batch.ndim != 4 and (batch.ndim != 5 or batch.shape[2] > 1 and images_a_frame == 1):
        raise ValueError("latents: latents of pictures are needed, with 4 dimensions or one frame, but these are "
                         f"{quoted(list(batch.shape))}; connect Make Training Dataset or VAE Encode.")
    if 0 in batch.shape:
        raise ValueError(f"latents: a LATENT is {list(batch.shape)}, so there is no picture in it; check the node that "
                         "made it.")
    if channels not in (None, batch.shape[1]):
        raise ValueError(f"latents: a LATENT has {batch.shape[1]} channels where those of the connected MODEL have "
                         f"{channels}; encode the pictures with the VAE that belongs to the MODEL.")
    _check_finite("latents", "a LATENT", batch)


def _check_caption(name: str, entry: list) -> None:
    """Check one entry of a CONDITIONING: the encoded text and the tensors beside it."""
    for tensor in (entry[0], *filter(torch.is_tensor, entry[1].values())):
        if not tensor.numel():
            raise ValueError(f"{name}: a caption is {list(tensor.shape)}, so there is nothing in it; check the node "
                             "that made it.")
        _check_finite(name, "a caption", tensor)


def _check_finite(name: str, what: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: {what} holds NaN or infinite values; check the node that made it.")


def _size(latent: torch.Tensor) -> tuple[int, int, int]:
    """Frames, in rows or in a dimension of their own, height and width; a picture has one frame."""
    return latent.shape[0] * latent.shape[2:-2].numel(), *latent.shape[-2:]


def _alike(sizes: list[tuple]) -> list[list[int]]:
    """Indices of the sizes, equal ones together, in the order in which each size first appears."""
    groups: dict = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return list(groups.values())
