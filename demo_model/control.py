"""ControlNeXt for the demonstration's UNet: a narrow module after the first convolution, and a few UNet weights.

The features enter where an SDXL ControlNeXt does: this UNet has one level, so SD1.5's own place does not exist in it.
"""

from __future__ import annotations

import torch
from torch import nn

from controlnext_core.families import FAMILIES
from controlnext_core.training import add_features, control_features, new_module, select_weights
from controlnext_core.unet_keys import diffusers_to_ldm

FAMILY = FAMILIES["sd15"]
PLACE = "conv_in"
# what the reference trains of SD1.5, and the convolution that meets the features, since so small a UNet has one chance
UNET_PATTERN = r"to_out|down_blocks.*conv1"
WIDTHS = {"stem_0": 32, "stem_1": 32, "width_0": 64, "width_1": 64, "width_2": 128}
LEARNING_RATE, UNET_LEARNING_RATE = 1e-3, 3e-4
SNR_LIMIT = 1.0  # control is about where things are, which is settled while noise prevails
DROPPED_CAPTIONS = 0.3  # more than usual: control is to work without a prompt as well
SWAPPED_CAPTIONS = 0.3  # of edges, which tell more than a caption: they are to hold against what it makes expect


class Controlled(nn.Module):
    """A UNet and the module that controls it: ``(x, timestep, caption, control image) -> noise``.

    Args:
        zero_convolution: add the features through a convolution that begins as zeros, without cross normalization.

    Attributes:
        trained: {diffusers name: the UNet's own name} of the UNet weights that are trained along.
    """

    def __init__(self, unet: nn.Module, zero_convolution: bool = False):
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.zero_convolution = zero_convolution
        self.module = new_module(FAMILY, zero_convolution=zero_convolution, **WIDTHS)
        self.trained = select_weights(diffusers_to_ldm(unet.state_dict()), UNET_PATTERN)
        for key in self.trained.values():
            unet.get_parameter(key).requires_grad_(True)

    def rates(self) -> list[dict]:
        return [{"params": list(self.module.parameters()), "lr": LEARNING_RATE},
                {"params": [self.unet.get_parameter(key) for key in self.trained.values()], "lr": UNET_LEARNING_RATE}]

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, caption: torch.Tensor,
                image: torch.Tensor) -> torch.Tensor:
        features = control_features(self.module, FAMILY, image, timestep, x.shape[-2:], self.zero_convolution)

        def add(h: torch.Tensor, options: dict) -> torch.Tensor:
            if options["block"] != ("input", 0):
                return h
            return add_features(h, features, zero_convolution=self.zero_convolution)

        return self.unet(x, timesteps=timestep, context=caption,
                         transformer_options={"patches": {"input_block_patch_after_skip": [add]}})
