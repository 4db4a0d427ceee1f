"""The control module alone equals the reference implementation, and its two parts make the whole."""

import pytest
import torch

from controlnext_core.checkpoint import open_checkpoint
from controlnext_core.families import FAMILIES
from controlnext_core.layouts import TIME_WIDTHS
from controlnext_core.module import new_module

SMALL = dict(frequencies=8, time=16, stem_0=8, stem_1=8, width_0=16, width_1=16, width_2=32, out=12)
WITHOUT_TIME = {name: width for name, width in SMALL.items() if name not in TIME_WIDTHS}


@pytest.fixture
def family(released):
    return FAMILIES[released]


@pytest.fixture
def module(goldens, family):
    return open_checkpoint(goldens.state_dict(family.name), family.name).load_weights()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-5), (torch.float64, 1e-5)])
def test_features_equal_the_reference(goldens, family, module, dtype, bound):
    """In float32 up to the rounding of the processor's convolutions, and nearer in float64, which has none."""
    for case in goldens.module[family.name]["cases"]:
        image = goldens.input(case["image"]).to(dtype)
        image = image.flatten(0, 1) if image.ndim == 5 else image
        timestep = torch.tensor([float(case["timestep"])])
        with torch.no_grad():
            features = module.to(dtype)(image, timestep, family.stem_padding, family.stem_pool)
        assert goldens.difference("module.safetensors", case["output"], features.float()) <= bound, case["name"]


def test_image_part_serves_every_timestep(family, module):
    image = torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        part = module.image_part(image, family.stem_padding, family.stem_pool)
        kept = [tensor.clone() for tensor in part]
        for timestep in (0.0, 501.0):
            at = torch.tensor([timestep])
            whole = module(image, at, family.stem_padding, family.stem_pool)
            assert torch.equal(module.timestep_part(part, at), whole)
    assert all(torch.equal(before, after) for before, after in zip(kept, part, strict=True))


def test_one_timestep_serves_the_batch_and_each_may_have_its_own(family, module):
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    options = family.stem_padding, family.stem_pool
    with torch.no_grad():
        both = module(image, torch.tensor([10.0, 700.0]), *options)
        for index, timestep in enumerate((10.0, 700.0)):
            alone = module(image[index:index + 1], torch.tensor([timestep]), *options)
            assert torch.allclose(both[index], alone[0], atol=1e-5 * float(alone.std()))


def test_features_depend_on_image_and_timestep(family, module):
    options = family.stem_padding, family.stem_pool
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = module(image, torch.tensor([500.0]), *options)
        assert not torch.allclose(features, module(1 - image, torch.tensor([500.0]), *options))
        assert not torch.allclose(features, module(image, torch.tensor([100.0]), *options))


def test_a_new_module_has_the_keys_and_shapes_of_the_reference(goldens, released):
    expected = {key: shape for key, shape in goldens.module[released]["state_dict_shapes"].items() if key != "scale"}
    module = new_module(FAMILIES[released])
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == expected
    assert all(torch.isfinite(value).all() for value in module.parameters())


def test_a_small_module_reads_back_from_its_own_state_dict():
    module = new_module(FAMILIES["sd15"], **SMALL)
    again = open_checkpoint(module.state_dict(), "small.safetensors").load_weights()
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(image, torch.ones(1), 1, False), module(image, torch.ones(1), 1, False))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.timed])
def test_a_new_module_of_a_transformer_gives_the_same_features_at_every_timestep(name):
    family = FAMILIES[name]
    module = new_module(family, **WITHOUT_TIME)
    assert not any("time" in key for key in module.state_dict())

    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    again = open_checkpoint(module.state_dict(), "f").load_weights()
    features, late, early = (one(image, torch.tensor([at]), family.stem_padding, family.stem_pool)
                             for one, at in ((module, 0.0), (again, 0.0), (again, 1000.0)))
    assert torch.equal(features, late) and torch.equal(features, early)


def test_a_module_that_learns_its_scale_has_it_before_the_same_weights():
    plain, learning = new_module(FAMILIES["sdxl"], 5, **SMALL), new_module(FAMILIES["sdxl"], 5, scale=0.5, **SMALL)
    assert list(learning.state_dict()) == ["scale", *plain.state_dict()]
    assert learning.scale.item() == 0.5 and learning.scale.shape == ()
    assert all(torch.equal(value, learning.state_dict()[key]) for key, value in plain.state_dict().items())


def test_the_seed_makes_the_weights_and_leaves_other_random_numbers_alone():
    before = torch.random.get_rng_state()
    first, second, other = (new_module(FAMILIES["sdxl"], seed, **SMALL).mid_convs[1].weight for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_width_that_the_layout_lacks_is_named():
    with pytest.raises(ValueError, match="stem_0 is not a width of sd15_mid"):
        new_module(FAMILIES["sd15_mid"], stem_0=8)
    with pytest.raises(ValueError, match="time is not a width of flux"):
        new_module(FAMILIES["flux"], time=8)
