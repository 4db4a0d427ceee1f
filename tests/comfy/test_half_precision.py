"""Control in the precisions that people sample in, beside float32."""

import pytest
import torch
from models import UNETS, small_unet
from sampling import conds, latent, one_forward, picture


def deep_unet(base: str, dtype: torch.dtype):
    """A UNet with all blocks of ``base``, each as wide as the first: a CPU computes in half precision slowly."""
    config = UNETS[base][1]
    return small_unet(base, dtype, **{**config, "channel_mult": [1] * len(config["channel_mult"])})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", UNETS)
def test_half_precision_is_within_two_percent_of_float32(apply, controlnexts, base, dtype):
    x = 2 * torch.randn(latent(base).shape, generator=torch.Generator().manual_seed(1))
    results = {}
    for precision in (torch.float32, dtype):
        unet = deep_unet(base, precision)
        controlled = apply(unet, controlnexts[base], picture())
        results[precision] = one_forward(controlled, conds(unet, base)[0], x, 2.0).float()
    assert torch.isfinite(results[dtype]).all()
    assert not torch.equal(one_forward(unet, conds(unet, base)[0], x, 2.0).float(), results[dtype])
    difference = (results[dtype] - results[torch.float32]).norm() / results[torch.float32].norm()
    print(f"{base} {dtype}: {float(difference):.2%} of the float32 result")
    assert difference <= 0.02
