"""Control in the precisions that people sample in, beside float32."""

import pytest
import torch
from models import UNETS, small_unet
from sampling import conds, latent, one_forward, picture, relative


def deep_unet(base: str, dtype: torch.dtype):
    """A UNet with all blocks of ``base``, each as wide as the first: a CPU computes in half precision slowly."""
    config = UNETS[base][1]
    return small_unet(base, dtype, **{**config, "channel_mult": [1] * len(config["channel_mult"])})


@pytest.mark.parametrize("base", UNETS)
def test_half_precision_is_within_two_percent_of_float32(apply, controlnexts, base):
    """With the family that most files of the base are of."""
    noise = 2 * torch.randn(latent(base).shape, generator=torch.Generator().manual_seed(1))

    def controlled(dtype: torch.dtype, **settings) -> torch.Tensor:
        model = deep_unet(base, dtype)
        positive, _ = conds(model, base)
        return one_forward(apply(model, controlnexts[base], picture(), **settings), positive, noise, 2.0).float()
    expected = controlled(torch.float32)
    assert relative(controlled(torch.float32, strength=0.0), expected) > 0.01
    for dtype in (torch.float16, torch.bfloat16):
        result = controlled(dtype)
        assert torch.isfinite(result).all()
        difference = (result - expected).norm() / expected.norm()
        print(f"{base} {dtype}: {float(difference):.2%} of the float32 result")
        assert difference <= 0.02
