"""The samples of a training, row by row; here those of ComfyUI's dataset nodes: lists of latents and images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch

from ...controlnext_core.bases import BASES
from ...controlnext_core.sentences import quoted
from ...controlnext_core.sizes import as_rgb
from ..runtime.images import checked_image
from ..runtime.places import images_a_frame
from ..runtime.resolve import base_of_model, model_of


@dataclass(frozen=True)
class Sample:
    """A picture, or a video with all its frames.

    Attributes:
        latent: (1, C, h, w), (1, C, F, h, w), or (F, C, h, w) of a video whose frames are rows; as the VAE made it.
        caption: an entry of a CONDITIONING.
        images: (F, H, W, C) control images in [0, 1], one for each frame.
        weight: of the loss, of the latent's shape but with one channel; None where all of it counts alike.
    """

    latent: torch.Tensor
    caption: list
    images: torch.Tensor
    weight: torch.Tensor | None = None


class Data:
    """Samples by their rows, and batches of them.

    Attributes:
        ratio: pixels of a picture that one latent pixel stands for.
        images_a_frame: control images that a latent frame of a video stands for, the first one of all for one; 1 for
            a MODEL that knows only pictures.
        empty: the CONDITIONING of an empty prompt, for dropped captions, or None.
        videos: there are videos among the samples.
        worn: control images are the pictures, to be made small and worn whenever one comes up.
    """

    ratio: int
    images_a_frame = 1
    empty: list | None = None
    videos = False
    worn = False

    def buckets(self) -> list[list[int]]:
        """Indices of the samples, those of one size together."""
        raise NotImplementedError

    def latent_shape(self, row: int) -> tuple[int, ...]:
        """The shape of a sample's latent."""
        raise NotImplementedError

    def sample(self, row: int) -> Sample:
        raise NotImplementedError

    def read_ahead(self, next_rows: Callable[[], Sequence[int]]) -> None:
        """Begin to read the samples that will be asked for next, where reading takes time."""

    def sample_for(self, images: torch.Tensor | None, caption: list | None) -> Sample:
        """A sample of no picture, to sample one under these control images and this caption; None takes the first's.

        Raises:
            ValueError: the images are too small, or one of the two is not finite; names validation_image or
                validation_conditioning.
        """
        first = self.sample(0)
        if caption is None:
            caption = first.caption
        else:
            check_caption("validation_conditioning", caption)
        if images is None:
            return Sample(torch.zeros_like(first.latent), caption, first.images)

        _check_finite("validation_image", "the image", images)
        shape, size = list(first.latent.shape), [side // self.ratio for side in images.shape[1:3]]
        if 0 in size:
            raise ValueError(f"validation_image: it is {images.shape[2]}x{images.shape[1]}, less than the {self.ratio} "
                             "pixels that a latent pixel stands for; connect a larger one.")
        frames = (len(images) - 1) // self.images_a_frame + 1 if self.videos else 1
        shape[-2:] = size
        if self.videos:
            shape[2 if len(shape) == 5 else 0] = frames
        return Sample(torch.zeros(shape), caption, images if self.videos else images[:1])

    def batch_latents(self, rows: Sequence[int]) -> torch.Tensor:
        """(B, C, h, w) or (B, C, F, h, w), float32, as the VAE made them; B is all frames of videos in rows."""
        return torch.cat([self.sample(row).latent for row in rows]).float()

    def batch_weights(self, rows: Sequence[int]) -> torch.Tensor | None:
        """The weight of each position in the loss: ``batch_latents`` with one channel; None where all count alike."""
        samples = [self.sample(row) for row in rows]
        if all(sample.weight is None for sample in samples):
            return None
        return torch.cat([torch.ones_like(sample.latent[:, :1]) if sample.weight is None else sample.weight
                          for sample in samples]).float()

    def batch_images(self, rows: Sequence[int]) -> torch.Tensor:
        """``images_of`` the samples in these rows."""
        return self.images_of([self.sample(row) for row in rows])

    def images_of(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Control images (B, 3, H, W), float32 in [0, 1], B all frames of videos, without what fills no latent."""
        return torch.cat([self._filling(sample) for sample in samples]).float().movedim(-1, 1)

    def _filling(self, sample: Sample) -> torch.Tensor:
        """A sample's control images (F, H, W, 3) without frames and margins that fill no latent, as the VAE does."""
        images = as_rgb(sample.images[:self.frames_of(sample.latent)])
        height, width = (side // self.ratio * self.ratio for side in images.shape[1:3])
        top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
        return images[:, top:top + height, left:left + width]

    def frames_of(self, latent: torch.Tensor) -> int:
        """Frames of a video, of which a latent has fewer."""
        return self.images_a_frame * (_size(latent)[0] - 1) + 1

    def batch_conds(self, base_model, rows: Sequence[int], dropped: Sequence[bool], device) -> dict[str, torch.Tensor]:
        """``conds_of`` for one row of ``batch_latents`` each; some rows take the empty caption."""
        samples = [self.sample(row) for row in rows]
        captions = [self.empty[0] if drop else sample.caption for sample, drop in zip(samples, dropped, strict=True)]
        return conds_of(base_model, captions, [sample.latent for sample in samples], device)


def samples_for(model, latents: list[dict] | None, conditioning: list | None, images: list[torch.Tensor] | None,
                empty: list | None = None) -> "Samples":
    """``Samples`` of what is connected, as a MODEL sees them. ValueError: as theirs, or something is not connected."""
    for name, given in (("latents", latents), ("conditioning", conditioning), ("images", images)):
        if given is None:
            raise ValueError(f"{name}: nothing is connected; connect latents, conditioning and images, or a dataset.")

    running, latent_format = model_of(model), model.get_model_object("latent_format")
    return Samples(latents, conditioning, images, empty, running.ratio, BASES[base_of_model(running)].frames_in_rows,
                   images_a_frame(running.denoiser), latent_format.latent_channels)


class Samples(Data):
    """Latents, conditionings and control images that belong together, all in memory.

    Resolution Bucket regroups its latents and conditionings by size, sizes in the order in which they first appear. All
    three lists are put into that order here, so that they match with and without that node.

    Args:
        latents: LATENTs of any batch sizes; a ``noise_mask`` is what each position counts in the loss.
        conditioning: CONDITIONINGs with one entry per sample in all, per LATENT, or one entry for all.
        images: control images, one for each picture or frame, each as large as that.
        empty, ratio, images_a_frame: as of ``Data``.
        rows_are_frames: each LATENT is a video, a frame a row; otherwise a row is a sample.
        channels: the number that the MODEL's latents have; None takes any.

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
        weights = [_weight_of(latent) for latent in latents]
        if rows_are_frames:
            self.latents, self.weights = batches, weights
        else:
            self.latents = [one for batch in batches for one in batch.split(1)]
            self.weights = [one for weight, batch in zip(weights, batches, strict=True)
                            for one in ([None] * len(batch) if weight is None else weight.split(1))]
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
            check_caption("conditioning", caption)
        if empty is not None:
            if not empty:
                raise ValueError("empty_conditioning: it holds no caption; connect an encoded empty prompt.")
            check_caption("empty_conditioning", empty[0])
        order = [row for bucket in self.buckets() for row in bucket]
        self.captions = [self.captions[row % len(self.captions)] for row in order]
        self.images = [self.images[row] for bucket in alike([self._latent_size(one) for one in self.images])
                       for row in bucket]
        self.latents, self.weights = ([values[row] for row in order] for values in (self.latents, self.weights))
        for latent, image in zip(self.latents, self.images, strict=True):
            if self._latent_size(image)[0] != _size(latent)[0]:
                raise ValueError(f"images: there are {len(image)} control images for a video of "
                                 f"{self.frames_of(latent)} frames; connect one for each frame.")
            if self._latent_size(image) != _size(latent):
                height, width = (side * ratio for side in latent.shape[-2:])
                raise ValueError(f"images: a control image is {image.shape[2]}x{image.shape[1]} where its picture is "
                                 f"{width}x{height}; resize and crop control images exactly as the pictures.")

    def _latent_size(self, image: torch.Tensor) -> tuple[int, int, int]:
        """(frames, height, width) of the latent that a control stands for; what fills no latent is left out."""
        frames = (len(image) - 1) // self.images_a_frame + 1
        return frames, image.shape[1] // self.ratio, image.shape[2] // self.ratio

    def buckets(self) -> list[list[int]]:
        """Indices of the samples, those of one size together."""
        return alike([_size(latent) for latent in self.latents])

    def latent_shape(self, row: int) -> tuple[int, ...]:
        return tuple(self.latents[row].shape)

    def sample(self, row: int) -> Sample:
        return Sample(self.latents[row], self.captions[row], self.images[row], self.weights[row])


def conds_of(base_model, captions: Sequence[list], latents: Sequence[torch.Tensor], device) -> dict[str, torch.Tensor]:
    """Keyword arguments of ``base_model.apply_model``: one row of each for one row of each latent.

    Raises:
        ValueError: the captions of one batch have different lengths, which this MODEL cannot take.
    """
    conds = []
    for entry, latent in zip(captions, latents, strict=True):
        cond = comfy.samplers.encode_model_conds(base_model.extra_conds, comfy.sampler_helpers.convert_cond([entry]),
                                                 latent, device, "positive", latent_shapes=[latent.shape])[0]
        conds.append({name: value.process_cond(batch_size=len(latent), area=None, device=device)
                      for name, value in cond["model_conds"].items()})
    for name, value in conds[0].items():  # others are repeated to one length
        if type(value) is comfy.conds.CONDRegular and len({cond[name].cond.shape for cond in conds}) > 1:
            raise ValueError("conditioning: captions of one batch have different lengths, which this MODEL cannot "
                             "take at once; set batch_size to 1 or make all captions short.")
    return {name: value.to(device) if torch.is_tensor(value) else value
            for name, value in comfy.samplers.cond_cat(conds).items()}


def _check_latent(batch: torch.Tensor, images_a_frame: int, channels: int | None) -> None:
    if batch.is_nested:
        raise ValueError("latents: a LATENT holds a video and its sound, but control is learned from videos alone; "
                         "connect the video of Separate AV Latent.")
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


def _weight_of(latent: dict) -> torch.Tensor | None:
    """The weight of each position of a LATENT in the loss, in its shape with one channel: its ``noise_mask``."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    _check_finite("latents", "the noise_mask of a LATENT", mask)
    weight = comfy.utils.reshape_mask(mask.float(), latent["samples"].shape)[:, :1]
    if weight.min() < 0 or not weight.flatten(1).any(1).all():
        raise ValueError("latents: the noise_mask of a LATENT is black everywhere or below 0, so nothing of its "
                         "picture would be learned; paint it white where the loss is to count.")
    return weight


def check_caption(name: str, entry: list) -> None:
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


def alike(sizes: list[tuple]) -> list[list[int]]:
    """Indices of the sizes, equal ones together, in the order in which each size first appears."""
    groups: dict = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return list(groups.values())
