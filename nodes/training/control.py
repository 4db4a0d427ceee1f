"""The control that is trained, as the denoiser gets it: with gradients."""

import torch
from torch.utils.checkpoint import checkpoint

from ...controlnext_core.families import Family
from ...controlnext_core.features import control_features
from ...controlnext_core.sizes import halved
from ..runtime.control import images_of
from ..runtime.forward import Forward
from ..runtime.places import Place


class TrainingControl:
    """Serves the injection as a Control does, from a batch of images and with gradients; runs the module once a batch.

    Args:
        scale: for a module that learns none of its own.

    Attributes:
        place_name: of ``place``, in ``PLACES``.
        images: (B, 3, H, W), set before each forward: one a row, or the frames of its one video.
        acting: off, a forward goes without it and without the UNet differences that are trained with it.
    """

    sampling = None
    taken = False

    def __init__(self, module, family: Family, place: Place, place_name: str, scale: float):
        self.module, self.family, self.place, self.place_name = module, family, place, place_name
        self.scale = scale
        self.images: torch.Tensor | None = None
        self.acting = True

    def __call__(self, forward: Forward) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.acting:
            return None
        images, size = self.images.to(forward.device, forward.dtype), halved(forward.size, self.place.halvings)

        def image_part(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.module.image_part(image, self.family.stem_padding, self.family.stem_pool)

        def features_of(*images: torch.Tensor) -> torch.Tensor:
            return control_features(self.module, self.family, map(image_part, images), forward.at, size)

        if forward.video:  # in the memory of one latent frame
            groups = [images[list(images_of(frame, self.place.images))].split(1) for frame in forward.frames]
            features = torch.cat([checkpoint(features_of, *group, use_reentrant=False) for group in groups], 2)
        else:
            features = features_of(images)
        gain, _ = self.family.gains(self.scale if self.module.scale is None else self.module.scale)
        return features[None], features.new_ones(1, 1, 1, 1, 1) * gain
