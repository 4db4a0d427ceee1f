"""What the module computes, counted by PyTorch at the released sizes, and what need not be computed again."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from controlnext_core.checkpoint import open_checkpoint


@pytest.fixture
def module(goldens, request):
    return open_checkpoint(goldens.state_dict(request.param), request.param).load_weights()


def flops(function, *args) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("module, size, whole, image_only", [("sd15", 512, 0.103e12, 0.034e12),
                                                             ("sdxl", 1024, 0.414e12, 0.136e12)], indirect=["module"])
def test_a_third_of_the_work_depends_on_the_image_alone(module, size, whole, image_only):
    module = module.to("meta")
    image, at = torch.empty(1, 3, size, size, device="meta"), torch.empty(1, device="meta")
    part = module.image_part(image, 1, False)
    assert flops(module, image, at, 1, False) == pytest.approx(whole, rel=0.01)
    assert flops(module.image_part, image, 1, False) == pytest.approx(image_only, rel=0.01)
    assert flops(module.timestep_part, part, at) == pytest.approx(whole - image_only, rel=0.01)


@pytest.mark.parametrize("module", ["sd15", "sd15_mid"], indirect=True)
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_pooling_before_the_last_convolution_changes_nothing_and_saves_work(module, size):
    image = torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    at = torch.tensor([300.0])
    with torch.no_grad():
        part = module.image_part(image, 1, False)
        after = torch.nn.functional.adaptive_avg_pool2d(module.timestep_part(part, at), size)
        before = module.timestep_part(part, at, size)
    assert float((before - after).abs().max() / after.std()) <= 1e-5
    assert flops(module.timestep_part, part, at, size) < flops(module.timestep_part, part, at)
