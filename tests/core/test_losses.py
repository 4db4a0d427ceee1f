"""Losses of every kind of model, told from the estimate of the clean latents."""

import pytest
import torch

from controlnext_core.losses import prediction_loss


def test_losses_are_the_mean_squared_errors_of_what_each_kind_of_model_predicts():
    generator = torch.Generator().manual_seed(7)
    clean, noise, out = torch.randn(3, 5, 4, 8, 8, generator=generator)
    sigma = torch.tensor([0.05, 0.4, 0.9, 2.0, 14.0])
    wide = sigma[:, None, None, None]
    denoised = clean + wide * (noise - out)  # x - sigma * out
    assert torch.allclose(prediction_loss(denoised, clean, sigma, "epsilon"),
                          (out - noise).square().mean((1, 2, 3)), rtol=1e-3)
    # flow: x = (1 - sigma) x0 + sigma noise, out is noise - x0
    denoised = (1 - wide) * clean + wide * noise - wide * out
    assert torch.allclose(prediction_loss(denoised, clean, sigma, "flow"),
                          (out - (noise - clean)).square().mean((1, 2, 3)), rtol=1e-3)
    root = (wide ** 2 + 1).sqrt()  # v of the scaled input: alpha = 1 / root, sigma / root
    denoised = (clean + wide * noise) / root ** 2 - out * wide / root
    assert torch.allclose(prediction_loss(denoised, clean, sigma, "v"),
                          (out - (noise - wide * clean) / root).square().mean((1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_with_min_snr_an_error_of_the_picture_counts_as_its_signal_to_noise_ratio_up_to_gamma(prediction):
    clean, error = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    sigma = torch.tensor([0.1, 0.4, 0.8, 1.0])
    ratio = (1 - sigma) ** 2 / sigma ** 2 if prediction == "flow" else 1 / sigma ** 2
    loss = prediction_loss(clean + error, clean, sigma, prediction, min_snr_gamma=5.0)
    assert torch.allclose(loss, ratio.clamp(max=5.0) * error.square().mean((1, 2, 3)))
