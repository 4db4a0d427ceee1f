"""Sampling with ComfyUI's own samplers, short enough for tests."""

import comfy.nested_tensor
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

FAMILIES = {"sd15": "sd15", "sd15_mid": "sd15", "sdxl": "sdxl", "svd": "svd", "svd_padded": "svd", "svd_mid": "svd"}
FRAMES = 2
TOKENS = 8  # of a prompt; CLIP gives 77, but a transformer runs all through every layer
TRAINING = dict(batch_size=1, seed=1, training_dtype="fp32", trainable="module and UNet weights",
                gradient_checkpointing=True, save_every=0, preview_every=0)  # inputs of Train ControlNeXt
# {base: what is between batch and rows in its latents' shape}, if that is not 16 channels
LATENTS = {"sd15": (4,), "sdxl": (4,), "svd": (4,), "qwen_image": (16, 1), "flux2": (128,), "wan": (16, 2),
           "hunyuan_video15": (32, 2), "ltxv": (128, 2), "krea2": (16, 1),
           "anima": (16, 1), "auraflow": (4,), "ltx2": (128, 2)}
# as the denoisers' configurations name it
CONTEXT_WIDTHS = ("context_dim", "context_in_dim", "joint_attention_dim", "cap_feat_dim", "text_dim",
                  "caption_channels", "txtdim", "crossattn_emb_channels", "cond_seq_dim")


def cond(model, seed: int = 0, batch: int = 1, context: torch.Tensor | None = None, tokens: int = TOKENS,
         **extra) -> list:
    """A CONDITIONING with a seeded random prompt of the model's width."""
    config = model.model.model_config.unet_config
    sd3 = "context_embedder_config" in config
    generator = torch.Generator().manual_seed(1000 + seed)
    if context is None:
        tokens = 1 if config.get("use_temporal_attention") else tokens
        width = next((config[name] for name in CONTEXT_WIDTHS if name in config), 4096)  # else T5's
        # Krea 2 takes several layers of its encoder's, LTX-2 what its connectors leave for each of two streams
        width *= 2 if config.get("image_model") == "ltxav" else config.get("txtlayers", 1)
        context = torch.randn(batch, tokens, width, generator=generator)
    if "pooled_output" not in extra and (config.get("adm_in_channels") or "vec_in_dim" in config):
        extra["pooled_output"] = torch.randn(1, config.get("vec_in_dim") or (2048 if sd3 else 1280),
                                             generator=generator)
    if config.get("image_model") == "ltxv":  # its text encoder gives one with every prompt
        extra.setdefault("attention_mask", torch.ones(context.shape[:2], dtype=torch.long))
    if config.get("image_model") == "anima":  # the prompt's other half
        extra |= dict(t5xxl_ids=torch.arange(9) + seed, t5xxl_weights=torch.ones(9))
    return [[context, extra]]


def sample(model, positive, negative, latent, cfg: float = 1.0, steps: int = 2, sampler: str = "euler", seed: int = 5,
           scheduler: str = "normal", silent: bool = False, **options) -> torch.Tensor:
    """KSampler's own path: the sampled latent, packed with its sound's where the model draws one, unless ``silent``."""
    if not silent and model.model.model_config.unet_config.get("image_model") == "ltxav":
        sound = torch.zeros(len(latent), 8, 3 * latent.shape[2], 16)
        latent = comfy.nested_tensor.NestedTensor((latent, sound))
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        drawn = comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=seed,
                                    disable_pbar=True, **options)
    return comfy.utils.pack_latents(drawn.unbind())[0] if drawn.is_nested else drawn


def one_forward(model, positive, latent, sigma: float) -> torch.Tensor:
    """What the UNet returns for ``latent``, taken as its input, in one step of a sampler at ``sigma`` and cfg 1."""
    caught = []
    hook = model.model.diffusion_model.register_forward_hook(lambda module, args, output: caught.append(output))
    sampling = model.get_model_object("model_sampling")
    x = latent / sampling.calculate_input(torch.tensor([sigma]), torch.ones(1, 1, 1, 1))

    def sampler(apply, _, sigmas, extra_args=None, **__):
        apply(x.to(sigmas.device), sigmas[:1].expand(len(x)), **extra_args)
        return x
    try:
        with torch.inference_mode():
            comfy.sample.sample_custom(model, torch.zeros_like(x), 1.0, comfy.samplers.KSAMPLER(sampler),
                                       torch.tensor([sigma, 0.0]), positive, positive, torch.zeros_like(x),
                                       disable_pbar=True, seed=1)
    finally:
        hook.remove()
    return caught[0]


def one_call_each(monkeypatch, model) -> None:
    """Make ComfyUI believe that memory is short: the guidance halves run in separate calls."""
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e30)


def picture(seed: int = 0, count: int = 1, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def latent(base: str, batch: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    channels, *frames = LATENTS.get(base, (16,))
    return torch.zeros(FRAMES if base == "svd" else batch, channels, *frames, height, width)


def conds(model, base: str = ""):
    """(positive, negative) with what the model of this base needs."""
    extra = {"concat_latent_image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    extra = extra if base == "svd" else {}
    return cond(model, 0, **extra), cond(model, 1, **extra)


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of what is expected's standard deviation."""
    return float((result - expected).abs().max() / expected.std())
