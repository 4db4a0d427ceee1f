"""Names of transformers' weights in diffusers and ComfyUI, in small models of the real classes."""

from collections import defaultdict

import comfy.utils
import pytest
import torch
from models import TRANSFORMERS, transformer_model

from controlnext_core.unet_keys import targets_of

REAL_RATIO = {"flux": {"mlp_ratio": 4.0}, "chroma": {"mlp_ratio": 4.0}}  # ComfyUI's maps have no other
THEIRS = {"flux": "flux_to_diffusers", "chroma": "flux_to_diffusers", "flux2": "flux_to_diffusers",
          "z_image": "z_image_to_diffusers", "krea2": "krea2_to_diffusers",
          "auraflow": "auraflow_to_diffusers"}  # of comfy.utils


def shapes_of(base: str) -> tuple[dict, dict]:
    with torch.device("meta"):
        model = transformer_model(base, **REAL_RATIO.get(base, {})).model
    shapes = {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    return shapes, model.model_config.unet_config


@pytest.mark.versions
@pytest.mark.parametrize("base", TRANSFORMERS)
def test_every_tensor_of_a_transformer_has_its_names_and_no_row_two(base):
    shapes, _ = shapes_of(base)
    rows = defaultdict(list)
    for target in targets_of(shapes).values():
        rows[target.key].append(target.rows or (0, (*shapes[target.key], 1)[0]))
    assert rows.keys() == shapes.keys()
    for key, parts in rows.items():
        ends = [0, *(first + count for first, count in sorted(parts))]
        assert ends == [*(first for first, _ in sorted(parts)), (*shapes[key], 1)[0]]


@pytest.mark.parametrize("base", THEIRS)
def test_the_names_of_a_transformer_agree_with_comfyui_s_own(base):
    shapes, config = shapes_of(base)
    ours = {name: (target.key, target.rows and (0, *target.rows), target.exchanged)
            for name, target in targets_of(shapes).items()}
    theirs = {name: (at, None, False) if isinstance(at, str) else (at[0], at[1], len(at) > 2)
              for name, at in getattr(comfy.utils, THEIRS[base])(config).items()}
    theirs = {name: at for name, at in theirs.items() if at[0] in shapes}
    both = ours.keys() & theirs.keys()
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
    # a tensor may have more names in their map
    assert {ours[name][0] for name in both} == {key for key, _, _ in theirs.values()}


@pytest.mark.parametrize("base, name, key", [
    ("wan", "blocks.2.attn1.to_out.0.weight", "blocks.2.self_attn.o.weight"),
    ("wan", "blocks.2.norm2.weight", "blocks.2.norm3.weight"),
    ("wan", "blocks.2.modulation", "blocks.2.modulation"),
    ("qwen_image", "transformer_blocks.2.attn.to_out.0.weight", "transformer_blocks.2.attn.to_out.0.weight")])
def test_bases_that_comfyui_has_no_map_of_are_named_as_diffusers_does(base, name, key):
    assert targets_of(shapes_of(base)[0])[name].key == key
