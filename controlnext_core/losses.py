"""The losses of a training: the noise levels at which a step looks, and how wrong the model's prediction is there."""

import torch

# {what a model predicts: weight of a squared error of its estimated x0}. The prediction is (x - x0 * a) / b of a noisy
# x, so the weight is 1 / b^2, as the reference has it
LOSS_WEIGHTS = {
    "epsilon": lambda sigma: sigma ** -2,
    "v": lambda sigma: sigma ** -2 + 1,
    "flow": lambda sigma: sigma ** -2,
}
SIGNAL_TO_NOISE = {
    "epsilon": lambda sigma: sigma ** -2,
    "v": lambda sigma: sigma ** -2,
    "flow": lambda sigma: (sigma ** -1 - 1) ** 2,
}


def draw_levels(rows: int, levels: int, prediction: str, generator: torch.Generator) -> torch.Tensor:
    """The index of a noise level for each row of a batch, (rows,) int64, 0 the level of least noise.

    Each level is as likely as any other, as the reference has it. For flow models the middle ones are likelier:
    logit-normal with mean 0 and std 1, as SD3 was trained (arXiv 2403.03206); the levels themselves follow the model's
    shift.

    Args:
        levels: how many there are.
        prediction: epsilon, v or flow.
    """
    if prediction == "flow":
        return (torch.randn(rows, generator=generator).sigmoid() * levels).long().clamp(max=levels - 1)
    return torch.randint(levels, (rows,), generator=generator)


def draw_sigmas(rows: int, mean: float, std: float, limits: tuple[float, float],
                generator: torch.Generator) -> torch.Tensor:
    """Noise levels (rows,) of a continuous model: log-normal, as EDM draws them (arXiv 2206.00364), within limits.

    Args:
        mean, std: of the logarithm.
        limits: (lowest, highest) level.
    """
    return (mean + std * torch.randn(rows, generator=generator)).exp().clamp(*limits)


def prediction_loss(denoised: torch.Tensor, clean: torch.Tensor, sigma: torch.Tensor, prediction: str,
                    min_snr_gamma: float = 0.0, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error (N,) of the model's prediction, told from its estimate of the clean latents.

    Equal to ``mse(epsilon, noise)``, ``mse(v, alpha * noise - sigma * x0)`` or ``mse(velocity, noise - x0)`` of the
    reference, sample by sample. With min-SNR weighting (arXiv 2303.09556) an error of the clean latents counts
    min(signal-to-noise ratio, gamma) instead, whatever the model predicts.

    Args:
        denoised: the model's estimate of ``clean``, (N, ...).
        clean: the latents before noise, (N, ...).
        sigma: (N,) noise levels above 0: x0 + sigma * noise was seen, for flow (1 - sigma) * x0 + sigma * noise.
        prediction: epsilon, v or flow.
        min_snr_gamma: above 0, or 0 for the reference's loss.
        counts: (N, 1, ...), from 0 on, what each position counts in the mean; None is all alike.
    """
    if min_snr_gamma:
        weight = SIGNAL_TO_NOISE[prediction](sigma).clamp(max=min_snr_gamma)
    else:
        weight = LOSS_WEIGHTS[prediction](sigma)
    error = (denoised.float() - clean.float()).square()
    if counts is None:
        return weight * error.flatten(1).mean(1)
    counts = counts.expand_as(error)
    return weight * (error * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)
