"""Where control enters is read off the model's own structure."""

import pytest
import torch
from models import sd3_model, unet_model

from controlnext_core.bases import BASES

SHORT = dict(num_res_blocks=[1, 3], channel_mult=[1, 4], transformer_depth=[1, 0, 0, 0],
             transformer_depth_output=[1, 1, 0, 0, 0, 0])
EXPECTED = {  # {place: (block, channels, halvings)}
    "sd15": ({}, {"conv_in": (0, 320, 0), "down_0": (3, 320, 1), "down_1": (6, 640, 2), "down_2": (9, 1280, 3),
                  "before_middle": (11, 1280, 3)}),
    "sdxl": ({}, {"conv_in": (0, 320, 0), "down_0": (3, 320, 1), "down_1": (6, 640, 2), "before_middle": (8, 1280, 2)}),
    "svd": ({}, {"conv_in": (0, 320, 0), "down_0": (3, 320, 1), "down_1": (6, 640, 2), "down_2": (9, 1280, 3),
                 "before_middle": (11, 1280, 3)}),
    "sd15 with fewer levels": (SHORT, {"conv_in": (0, 320, 0), "down_0": (2, 320, 1), "before_middle": (5, 1280, 1)}),
}


@pytest.mark.versions
@pytest.mark.parametrize("name", EXPECTED)
def test_places_follow_the_blocks_of_the_model(pack, name):
    changes, expected = EXPECTED[name]
    places = pack("nodes.runtime.places").places_of(unet_model(name[:4].strip(), **changes).model.diffusion_model)
    middle = places.pop("middle")
    assert {place: (at.block[1], at.channels, at.halvings) for place, at in places.items()} == expected
    assert (middle.channels, middle.halvings) == expected["before_middle"][1:]
    assert all(at.slot == "input_block_patch_after_skip" for at in places.values())


@pytest.mark.parametrize("blocks", [24, 38])
def test_a_transformer_has_the_tokens_and_every_block_but_the_last(pack, blocks):
    with torch.device("meta"):
        transformer = sd3_model(depth=blocks).model.diffusion_model
    places = pack("nodes.runtime.places").places_of(transformer)
    assert list(places) == ["tokens", *(f"block_{index}" for index in range(blocks - 1))]
    assert [at.block for at in places.values()] == [("double_block", index) for index in range(blocks)]
    assert {(at.slot, at.channels, at.halvings) for at in places.values()} == {("controlnext_tokens", 64 * blocks, 1)}


def test_every_base_has_its_classes_of_comfyui_and_no_class_is_of_another(pack):
    places = pack("nodes.runtime.places")
    transformers = [base for row in places.TRANSFORMERS.values() for base in row.bases.values()]
    unets = [base for base, _ in places.UNET_BASES.values()]
    assert sorted([*transformers, *unets]) == sorted(BASES)
