"""Control features, as sampling and training compute them."""

import pytest
import torch

from controlnext_core.cross_normalization import fit
from controlnext_core.families import FAMILIES
from controlnext_core.features import add_features, control_features
from controlnext_core.module import new_module

SIZE = (4, 4)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def module(family):
    return new_module(family, out=32)


@pytest.fixture
def image_part(family, module):
    return lambda images: module.image_part(images, family.stem_padding, family.stem_pool)


def drawn(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_gradients_reach_every_parameter_through_cross_normalization(family, module, image_part):
    features = control_features(module, family, [image_part(drawn(2))], torch.tensor([1.0, 500.0]), SIZE)
    h = add_features(torch.randn(2, 32, *SIZE), features, family.gains(1.0)[0])
    (h * torch.randn_like(h)).sum().backward()
    without = [name for name, value in module.named_parameters() if not value.grad.any()]
    assert without == []


def test_images_of_a_batch_have_the_features_that_each_has_alone(family, module, image_part):
    images, timesteps = drawn(2), torch.tensor([10.0, 700.0])
    with torch.no_grad():
        together = control_features(module, family, [image_part(images)], timesteps, SIZE)
        alone = [control_features(module, family, [image_part(images[i:i + 1])], timesteps[i:i + 1], SIZE)
                 for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def test_of_images_that_share_a_frame_the_mean_is_standardized(family, module, image_part):
    images, at = drawn(4), torch.tensor([300.0])
    with torch.no_grad():
        shared = control_features(module, family, map(image_part, images.split(1)), at, SIZE)
        mean = module(images, at, family.stem_padding, family.stem_pool).mean(0, keepdim=True)
        expected = fit(mean, SIZE, family.pool_first, family.eps)
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-4)


def test_image_parts_are_taken_one_after_the_other(module, family, image_part, monkeypatch):
    order = []
    timestep_part = module.timestep_part
    monkeypatch.setattr(module, "timestep_part", lambda *args: order.append("timestep") or timestep_part(*args))
    parts = (order.append("image") or image_part(image) for image in drawn(3).split(1))
    with torch.no_grad():
        control_features(module, family, parts, torch.tensor([300.0]), SIZE)
    assert order == ["image", "timestep"] * 3
