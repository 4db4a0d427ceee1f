"""Control features, as sampling and training compute them."""

import pytest
import torch

from controlnext_core.families import FAMILIES
from controlnext_core.features import add_features, control_features
from controlnext_core.module import new_module


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_gradients_reach_every_parameter_through_cross_normalization(family):
    module = new_module(family, out=32, time=32)
    features = control_features(module, family, torch.rand(2, 3, 64, 64), torch.tensor([1.0, 500.0]), (4, 4))
    h = add_features(torch.randn(2, 32, 4, 4), features, family.gains(1.0)[0])
    (h * torch.randn_like(h)).sum().backward()
    without = [name for name, value in module.named_parameters() if not value.grad.any()]
    assert without == []
