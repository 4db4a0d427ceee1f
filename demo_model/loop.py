"""One training loop for everything here: resumable, with a moving average of the weights as its result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SAVE_EVERY = 250  # steps
WARM_UP = 0.04  # share of the steps, the first ones, in which the learning rate rises
DECAY = 0.3  # share of the steps, the last ones, in which the learning rate falls to zero
MAX_GRADIENT_NORM = 1.0


def initialise(model: nn.Module) -> None:
    """Give every layer torch's own first weights; ComfyUI's layers leave them unset."""
    for layer in model.modules():
        for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 where the device does; a CPU without instructions for it would take eight times as long."""
    there = device.type != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=there)


def train(model: nn.Module, loss_of_batch: Callable[[torch.Generator], torch.Tensor], rates: list[dict],
          steps: int, file: Path, average: float = 0.999, save_every: int = SAVE_EVERY,
          watch: Callable[[int, nn.Module], None] | None = None, seed: int = 0) -> nn.Module:
    """Train `model` down `loss_of_batch`, from the state in `file` on where there is one.

    Args:
        loss_of_batch: draws a batch with the generator that it gets, on the model's device and seeded by seed and
            step, and gives its loss.
        rates: AdamW's parameter groups.
        average: decay of the moving average.
        save_every: steps between two savings of the state.
        watch: gets the step and the moving average whenever the state is to be saved, and before the first step.

    Returns:
        The moving average of `model`.
    """
    optimizer = torch.optim.AdamW(rates, weight_decay=0.01, betas=(0.9, 0.99))
    peaks = [group["lr"] for group in optimizer.param_groups]
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    first = 0
    if file.exists():
        state = torch.load(file, map_location=parameters[0].device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.load_state_dict(state["averaged"])
        first = state["step"]
    if watch and not first:
        watch(0, averaged.module)

    start, losses = time.monotonic(), []
    for step in range(first, steps):
        share = min(1.0, (step + 1) / (WARM_UP * steps), (steps - step) / (DECAY * steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share

        loss = loss_of_batch(torch.Generator(parameters[0].device).manual_seed(seed * steps + step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        averaged.update_parameters(model)
        losses.append(loss.detach())

        if (step + 1) % save_every == 0 or step + 1 == steps:
            print(f"{file.stem}: step {step + 1} of {steps}, {time.monotonic() - start:.0f} s, loss "
                  f"{torch.stack(losses).mean().item():.4f}", flush=True)
            losses.clear()
            if watch:
                watch(step + 1, averaged.module)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "averaged": averaged.state_dict(), "step": step + 1}, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)

    return averaged.module.requires_grad_(False).eval()
