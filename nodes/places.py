"""Where control can enter a UNet of ComfyUI, read off the model's own structure."""

from dataclasses import dataclass

import comfy.model_patcher
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

INPUT_SLOT = "input_block_patch_after_skip"
# ComfyUI before 0.18 has no patch after the middle block; the first output block gets the same features next
MIDDLE_SLOT, MIDDLE_BLOCK = (
    ("middle_block_after_patch", ("middle", 0))
    if hasattr(comfy.model_patcher.ModelPatcher, "set_model_middle_block_after_patch")
    else ("output_block_patch", ("output", 0))
)
PLACES = ("conv_in", "down_0", "down_1", "down_2", "before_middle", "middle")


@dataclass(frozen=True)
class Place:
    """One point of a UNet: the slot and block of the patch that reaches it, its width, the latent's halvings there."""

    slot: str
    block: tuple[str, int]
    channels: int
    halvings: int


def places_of(unet) -> dict[str, Place]:
    """{name: Place} of a UNetModel with any number of blocks: ``down_i`` follows its i-th Downsample."""
    places = {}
    halvings = 0
    for index, block in enumerate(unet.input_blocks):
        channels = next(layer.out_channels for layer in reversed(block) if hasattr(layer, "out_channels"))
        if index == 0:
            places["conv_in"] = Place(INPUT_SLOT, ("input", index), channels, halvings)
        if any(isinstance(layer, Downsample) for layer in block):
            halvings += 1
            places[f"down_{halvings - 1}"] = Place(INPUT_SLOT, ("input", index), channels, halvings)
    places["before_middle"] = Place(INPUT_SLOT, ("input", index), channels, halvings)
    places["middle"] = Place(MIDDLE_SLOT, MIDDLE_BLOCK, channels, halvings)
    return places
