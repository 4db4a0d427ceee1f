"""The two files of a release, control and UNet weights, with the metadata that this project adds to them."""

from collections.abc import Mapping

import torch

from .families import Family
from .layouts import layout_of

# metadata of our files: a family's name, the name of the place where control enters, and difference or replace
FAMILY_KEY, PLACE_KEY, MODE_KEY = "controlnext.family", "controlnext.place", "controlnext.unet"
SCALED_LAYOUTS = ("mid", "video_mid")  # their files always hold the number ``scale``; others do if it is not 1


def with_scale(module: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A module's state dict with the scale, as a file holds it; a trained one is in the state dict and stays."""
    return {"scale": torch.tensor(scale), **module}


def reference_files(module: Mapping[str, torch.Tensor], family: Family | None, scale: float,
                    differences: Mapping[str, torch.Tensor], place: str | None = None) -> dict[str, tuple[dict, dict]]:
    """{file name: (tensors, metadata)} as the reference implementation names and reads them.

    Args:
        module: the module's state dict.
        family: None when it is not known; the files then do not tell it.
        scale: the learned scale; the reference's own code reads no other than 1 outside SCALED_LAYOUTS.
        differences: {diffusers name: tensor}; without any there is one file.
        place: where control enters the denoiser; None when it is not known.
    """
    held = scale != 1 or layout_of(list(module)) in SCALED_LAYOUTS
    tensors = with_scale(module, scale) if held else dict(module)

    metadata = {FAMILY_KEY: family.name} if family else {}
    if place:
        metadata[PLACE_KEY] = place

    files = {"controlnet.safetensors": (tensors, metadata)}
    if differences:
        files["unet.safetensors"] = (dict(differences), {**metadata, MODE_KEY: "difference"})
    return files
