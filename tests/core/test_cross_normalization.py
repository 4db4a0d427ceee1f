"""Cross normalization against its formula, written out plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from controlnext_core.cross_normalization import add_controls, add_to_tokens, fit, standardize


def random(*shape, seed=0, scale=1.0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def reference(h, c, eps, pool_first):
    """The reference's two orders: normalize against h before or after the pooling to h's size."""
    if pool_first:
        c = F.adaptive_avg_pool2d(c, h.shape[-2:])
    dims = (1, 2, 3)
    c = ((c - c.mean(dims, keepdim=True)) * (h.std(dims, keepdim=True) / (c.std(dims, keepdim=True) + eps))
         + h.mean(dims, keepdim=True))
    return F.adaptive_avg_pool2d(c, h.shape[-2:])


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (15, 9), (31, 31)])
def test_equals_the_references_order_of_pooling_and_normalizing(pool_first, eps, size):
    h = random(2, 8, *size, seed=1, scale=3.0, shift=0.5)
    c = random(2, 8, 16, 18, seed=2, scale=0.1, shift=-0.2)
    features = fit(c, size, pool_first, eps)
    out = add_controls(h, [(features[None], torch.tensor([0.7]).reshape(1, 1, 1, 1, 1))])
    assert torch.allclose(out, h + 0.7 * reference(h, c, eps, pool_first), atol=1e-5)


def test_the_std_is_unbiased():
    c = random(1, 2, 2, 2)
    assert standardize(c, 0.0).std(unbiased=True).item() == pytest.approx(1.0, abs=1e-6)


def test_half_precision_keeps_its_dtype_and_float32_statistics():
    c = random(1, 320, 64, 64, scale=300.0, shift=900.0)  # sums of squares far beyond float16
    half = standardize(c.half(), 1e-12)
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), standardize(c, 1e-12), atol=5e-3)


def test_constant_control_adds_the_mean_alone():
    h = random(1, 4, 8, 8, shift=2.0)
    out = add_controls(h, [(standardize(torch.zeros(1, 4, 8, 8), 1e-5)[None], torch.ones(1, 1, 1, 1, 1))])
    assert torch.allclose(out, h + h.mean(), atol=1e-5)


def test_weight_of_zero_keeps_every_bit_of_that_half():
    h = random(4, 4, 8, 8)
    weight = torch.tensor([0.5, 0.0]).reshape(2, 1, 1, 1, 1)
    out = add_controls(h, [(random(1, 1, 4, 8, 8, seed=3), weight)])
    assert torch.equal(out[2:], h[2:])
    assert not torch.equal(out[:2], h[:2])


def test_memory_format_of_the_denoiser_is_kept():
    h = random(2, 8, 8, 8)
    features = random(1, 1, 8, 8, 8, seed=1).permute(0, 1, 4, 2, 3)
    weight = torch.ones(2, 1, 1, 1, 1)
    assert add_controls(h, [(features, weight)]).stride() == h.stride()
    last = h.to(memory_format=torch.channels_last)
    assert add_controls(last, [(features, weight)]).stride() == last.stride()


def test_denoiser_features_are_not_written_to():
    h = random(2, 4, 8, 8)
    before = h.clone()
    add_controls(h, [(random(1, 1, 4, 8, 8, seed=1), torch.ones(2, 1, 1, 1, 1))])
    assert torch.equal(h, before)


def test_features_of_another_size_are_pooled_to_the_denoisers():
    """A patch that shrinks the UNet's features on the way (Kohya deep shrink) meets control of its own size."""
    h = random(1, 4, 4, 4)
    features = random(1, 4, 8, 8, seed=1)
    out = add_controls(h, [(features[None], torch.ones(1, 1, 1, 1, 1))])
    pooled = F.adaptive_avg_pool2d(features, (4, 4))
    assert torch.allclose(out, h + pooled * h.std() + h.mean(), atol=1e-5)


class Dtypes(TorchDispatchMode):
    """Lists the dtype of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found += [tensor.dtype for tensor in (result if isinstance(result, tuple) else (result,))]
        return result


def controlled(h, c, weight, tokens: bool):
    """``add_controls``, or the same by way of tokens."""
    if not tokens:
        return add_controls(h, [(c, weight)])
    out = add_to_tokens(h.flatten(2).transpose(1, 2), [(c, weight)])
    return out.transpose(1, 2).unflatten(2, h.shape[-2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (3.0, 100.0), (0.01, 0.0), (20.0, 1000.0)])
@pytest.mark.parametrize("tokens", [False, True])
def test_in_half_precision_control_is_exact_to_its_rounding(dtype, scale, shift, tokens):
    h = random(2, 320, 64, 64, seed=1, scale=scale, shift=shift).to(dtype)
    c = random(1, 1, 320, 64, 64, seed=2).to(dtype)
    weight = torch.tensor([0.7, 1.0], dtype=dtype).reshape(2, 1, 1, 1, 1)
    out = controlled(h, c, weight, tokens)
    assert out.dtype == dtype

    wide, weight = h.float(), weight[:, 0].float()
    std, mean = torch.std_mean(wide, dim=(1, 2, 3), keepdim=True)
    parts = wide, c[0].float() * std * weight, mean * weight
    # smaller numbers than the smallest normal one are rounded as that is
    rounding = torch.finfo(dtype).eps * (sum(part.abs() for part in parts) + torch.finfo(dtype).tiny)
    assert ((out.float() - sum(parts)).abs() <= 2 * rounding).all()


@pytest.mark.parametrize("tokens", [False, True])
def test_in_half_precision_nothing_is_copied_to_float32(tokens):
    h, c, weight = (random(*shape).half() for shape in ((2, 8, 4, 4), (1, 1, 8, 4, 4), (2, 1, 1, 1, 1)))
    with Dtypes() as dtypes:
        controlled(h, c, weight, tokens)
    assert set(dtypes.found) == {torch.float16}
