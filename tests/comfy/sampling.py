"""Sampling with ComfyUI's own samplers, short enough for tests."""

import comfy.sample
import comfy.samplers
import torch


def cond(model, seed: int = 0, batch: int = 1, context: torch.Tensor | None = None, **extra) -> list:
    """A CONDITIONING with a seeded random prompt of the model's width."""
    unet = model.model.diffusion_model
    generator = torch.Generator().manual_seed(1000 + seed)
    if context is None:
        tokens = 1 if model.model.model_config.unet_config.get("use_temporal_attention") else 77
        width = model.model.model_config.unet_config["context_dim"]
        context = torch.randn(batch, tokens, width, generator=generator)
    if unet.num_classes is not None and "pooled_output" not in extra:
        extra["pooled_output"] = torch.randn(1, 1280, generator=generator)
    return [[context, extra]]


def sample(model, positive, negative, latent, cfg: float = 1.0, steps: int = 3, sampler: str = "euler", seed: int = 5,
           scheduler: str = "normal", **options) -> torch.Tensor:
    """KSampler's own path: the sampled latent."""
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=seed,
                                   disable_pbar=True, **options)


def one_forward(model, positive, latent, sigma: float) -> torch.Tensor:
    """What the UNet returns for ``latent``, taken as its input, in one step of a sampler at ``sigma`` and cfg 1."""
    caught = []
    hook = model.model.diffusion_model.register_forward_hook(lambda module, args, output: caught.append(output))
    # calculate_input divides by this factor
    x = latent * (sigma ** 2 + model.model.model_sampling.sigma_data ** 2) ** 0.5

    def sampler(apply, _, sigmas, extra_args=None, **__):
        apply(x, sigmas[:1].expand(len(x)), **extra_args)
        return x
    try:
        with torch.inference_mode():
            comfy.sample.sample_custom(model, torch.zeros_like(x), 1.0, comfy.samplers.KSAMPLER(sampler),
                                       torch.tensor([sigma, 0.0]), positive, positive, torch.zeros_like(x),
                                       disable_pbar=True, seed=1)
    finally:
        hook.remove()
    return caught[0]
