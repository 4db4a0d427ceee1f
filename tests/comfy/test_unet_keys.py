"""Diffusers UNet names and ComfyUI's map one to one, in the UNets that ComfyUI builds."""

import comfy.utils
import pytest
import torch
from models import SMALL, UNETS, unet_model

from controlnext_core.unet_keys import diffusers_to_ldm

FIVE_LEVELS = dict(num_res_blocks=[3] * 5, channel_mult=[1, 1, 2, 2, 4], transformer_depth=[1, 1, 0] * 5,
                   transformer_depth_output=[2, 1, 0, 1] * 5, transformer_depth_middle=3)
UNEVEN = dict(num_res_blocks=[3, 1, 2], channel_mult=[1, 2, 4], transformer_depth=[1, 1, 2, 0, 1, 1],
              transformer_depth_output=[1, 0, 1, 1, 2, 2, 1, 1, 1], transformer_depth_middle=1)


def shapes_of(base: str, **changes) -> tuple[dict, dict]:
    """({LDM key: shape}, ComfyUI's own diffusers map) of a UNet without memory for its weights."""
    with torch.device("meta"):
        model = unet_model(base, **changes).model
    shapes = {key: list(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    theirs = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    return shapes, {name: key for name, key in theirs.items() if key in shapes}


@pytest.mark.parametrize("base", UNETS)
def test_every_diffusers_key_is_one_key_of_the_model_and_the_other_way_round(goldens, base):
    shapes, _ = shapes_of(base)
    names = diffusers_to_ldm(shapes)
    assert sorted(names.values()) == sorted(shapes)
    assert {name: shapes[key] for name, key in names.items()} == goldens.unet_shapes[base]


@pytest.mark.parametrize("base", UNETS)
@pytest.mark.parametrize("changes", [{}, SMALL, FIVE_LEVELS], ids=["full", "small", "five_levels"])
def test_the_names_agree_with_comfyui_for_any_block_counts(base, changes):
    shapes, theirs = shapes_of(base, **changes.get(base, changes))
    names = diffusers_to_ldm(shapes)
    assert sorted(names.values()) == sorted(shapes)
    # label_emb has a second name in ComfyUI's map, and nothing that is new in SVD has one
    theirs = {name: key for name, key in theirs.items() if not name.startswith("class_embedding.")}
    spatial = {name.replace(".spatial_res_block.", "."): key for name, key in names.items()}
    assert theirs.items() <= spatial.items()
    assert base == "svd" or theirs == names


@pytest.mark.parametrize("base", UNETS)
def test_levels_may_have_different_block_counts(base):
    shapes, _ = shapes_of(base, **UNEVEN)
    names = diffusers_to_ldm(shapes)
    assert sorted(names.values()) == sorted(shapes)
    resnets = {name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")}
    assert resnets == {"0", "1", "2"}
    assert {name.split(".")[3] for name in names if name.startswith("up_blocks.1.resnets.")} == {"0", "1"}
