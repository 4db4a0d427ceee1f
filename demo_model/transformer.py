"""The transformer: ComfyUI's own SD3 class with few blocks; and its training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT, RMSNorm

from demo_model.bases import Base
from demo_model.loop import mixed_precision
from demo_model.samples import TIMESTEPS, Samples
from demo_model.text import WIDTH

LEARNING_RATE = 1e-3
DROPPED_CAPTIONS = 0.1
# the logit-normal density of noise levels (arXiv 2403.03206): above 0, for the shape of the whole is fixed there
LEVEL_MEAN, LEVEL_STD = 0.5, 1.0


def new_transformer(base: Base) -> MMDiT:
    """A fresh transformer in float32 whose blocks begin as no change, and whose text has no columns of zeros.

    ComfyUI tells its number of blocks by its width, 64 channels and a head each.
    """
    torch.manual_seed(0)
    model = MMDiT(input_size=None, patch_size=2, in_channels=base.channels, depth=base.width // 64,
                  adm_in_channels=WIDTH,
                  context_embedder_config={"target": "torch.nn.Linear",
                                           "params": {"in_features": WIDTH, "out_features": base.width}},
                  qk_norm="rms", operations=torch.nn, dtype=torch.float32)

    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            torch.nn.init.zeros_(parameter)
    for layer in model.modules():
        if isinstance(layer, RMSNorm):
            torch.nn.init.ones_(layer.weight)
    return model


def predict(model: MMDiT, x: torch.Tensor, level: torch.Tensor, texts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The velocity (N, C, h, w) at noise levels (N,) in [0, 1], for rows of ``Texts``."""
    context, counts, pooled = texts
    picture = counts.new_ones(len(x), (x.shape[-1] // 2) * (x.shape[-2] // 2))
    bias = torch.cat([counts, picture], dim=1).log()[:, None, None]

    def attention(function, q, k, v, heads, transformer_options=None, **options):
        return function(q, k, v, heads=heads, mask=bias.expand(-1, heads, q.shape[1], -1), **options)

    return model(x, level * TIMESTEPS, y=pooled, context=context,
                 transformer_options={"optimized_attention_override": attention})


def flow_loss(model: MMDiT, samples: Samples, batch: int) -> Callable[[torch.Generator], torch.Tensor]:
    """The loss of a batch of so many samples: how far the velocity is off."""
    def loss_of_batch(generator: torch.Generator) -> torch.Tensor:
        x0, caption, _, noise, spread = samples.batch(generator, DROPPED_CAPTIONS, 0.0, batch)
        level = (LEVEL_MEAN + LEVEL_STD * torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4))).sigmoid()
        share = level[:, None, None, None]
        with mixed_precision(samples.device):
            velocity = predict(model, (1 - share) * x0 + share * noise, level, caption)
        return (velocity.float() - (noise - x0)).square().mean()

    return loss_of_batch
