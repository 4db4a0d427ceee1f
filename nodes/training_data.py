"""The samples of a training: latents, captions and control images of ComfyUI's dataset nodes, row by row."""

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch

from ..controlnext_core.sizes import as_rgb


class Samples:
    """Latents, conditionings and control images that belong together, and batches of them.

    Resolution Bucket regroups its latents and conditionings by size, sizes in the order in which they first appear. All
    three lists are put into that order here, so that they match with and without that node.

    Args:
        latents: LATENTs of any batch sizes.
        conditioning: CONDITIONINGs with one entry per latent in all, or one entry for all.
        images: control images, as many as latents, each as large as its picture.
        empty: CONDITIONING of an empty prompt, for dropped captions, or None.
        ratio: pixels of a picture that one latent pixel stands for.

    Raises:
        ValueError: their numbers or sizes do not match; one sentence that names the input.
    """

    def __init__(self, latents: list[dict], conditioning: list, images: list[torch.Tensor], empty: list | None,
                 ratio: int):
        batches = [latent["samples"] for latent in latents]
        if any(batch.ndim != 4 for batch in batches):
            raise ValueError("latents: latents of pictures are needed, with 4 dimensions, but these have "
                             f"{next(batch.ndim for batch in batches if batch.ndim != 4)}; connect Make Training "
                             "Dataset or VAE Encode.")
        self.latents = [one for batch in batches for one in batch]
        self.images = [one for batch in images for one in batch]
        self.captions = [entry for entries in conditioning for entry in entries]
        self.empty = empty
        self.ratio = ratio
        count = len(self.latents)
        if len(self.images) != count:
            raise ValueError(f"images: there are {len(self.images)} control images for {count} latents; connect one "
                             "control image for each picture, in the same order.")
        if len(self.captions) not in (1, count):
            raise ValueError(f"conditioning: there are {len(self.captions)} captions for {count} latents; connect one "
                             "for each picture, or one for all.")
        order = [row for bucket in _by_size([one.shape[-2:] for one in self.latents]) for row in bucket]
        self.latents = [self.latents[row] for row in order]
        self.captions = [self.captions[row % len(self.captions)] for row in order]
        self.images = [self.images[row] for bucket in _by_size([self._latent_size(one) for one in self.images])
                       for row in bucket]
        for latent, image in zip(self.latents, self.images, strict=True):
            if self._latent_size(image) != tuple(latent.shape[-2:]):
                height, width = (side * ratio for side in latent.shape[-2:])
                raise ValueError(f"images: a control image is {image.shape[1]}x{image.shape[0]} where its picture is "
                                 f"{width}x{height}; resize and crop control images exactly as the pictures.")

    def _latent_size(self, image: torch.Tensor) -> tuple[int, int]:
        return image.shape[0] // self.ratio, image.shape[1] // self.ratio

    def buckets(self) -> list[list[int]]:
        """Indices of the samples, those of one size together."""
        return _by_size([latent.shape[-2:] for latent in self.latents])

    def batch_latents(self, rows: list[int]) -> torch.Tensor:
        """(B, C, h, w), float32, as the VAE made them."""
        return torch.stack([self.latents[row] for row in rows]).float()

    def batch_images(self, rows: list[int]) -> torch.Tensor:
        """(B, 3, H, W), float32 in [0, 1], cropped to what the VAE sees of a picture."""
        return torch.stack([self._cropped(as_rgb(self.images[row])) for row in rows]).float().movedim(-1, 1)

    def _cropped(self, image: torch.Tensor) -> torch.Tensor:
        height, width = (side * self.ratio for side in self._latent_size(image))
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return image[top:top + height, left:left + width]

    def batch_conds(self, base_model, rows: list[int], dropped: list[bool], device) -> dict[str, torch.Tensor]:
        """Keyword arguments of ``base_model.apply_model``: one row of each for one row of the batch.

        Args:
            dropped: which rows take the empty caption.
        """
        conds = []
        for row, drop in zip(rows, dropped, strict=True):
            entry = self.empty[0] if drop else self.captions[row]
            cond = comfy.samplers.encode_model_conds(
                base_model.extra_conds, comfy.sampler_helpers.convert_cond([entry]), self.latents[row][None], device,
                "positive")[0]
            conds.append({name: value.process_cond(batch_size=1, area=None, device=device)
                          for name, value in cond["model_conds"].items()})
        for name, value in conds[0].items():  # others are repeated to one length
            if type(value) is comfy.conds.CONDRegular and len({cond[name].cond.shape for cond in conds}) > 1:
                raise ValueError("conditioning: captions of one batch have different lengths, which this MODEL cannot "
                                 "take at once; set batch_size to 1 or make all captions short.")
        return {name: value.to(device) for name, value in comfy.samplers.cond_cat(conds).items()}


def _by_size(sizes: list) -> list[list[int]]:
    """Indices of the sizes, equal ones together, in the order in which each size first appears."""
    groups: dict = {}
    for index, size in enumerate(sizes):
        groups.setdefault(tuple(size), []).append(index)
    return list(groups.values())
