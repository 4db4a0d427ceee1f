"""Training ControlNeXt: the module, optionally with differences of a few UNet weights, on a frozen denoiser.

A step is: ``draw_rows``, noise the latents, run the denoiser with ``control_features`` added by ``add_features`` (or by
whatever calls ``cross_normalization.add_controls``), ``prediction_loss``, ``Training.update``.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

import torch
from torch import nn

from .cross_normalization import add_controls, fit
from .families import Family
from .layouts import layout_of
from .module import ControlNeXtModule

T = TypeVar("T")
# the reference's widths by layout
WIDTHS = {
    "light": dict(frequencies=128, time=256, stem_0=64, stem_1=64, width_0=128, width_1=128, width_2=256, out=320),
    "mid": dict(frequencies=128, time=256, width_0=3, width_1=128, width_2=256, width_3=256, out=1280),
    "video_mid": dict(frequencies=128, time=256, stem_0=64, stem_1=64, width_0=128, width_1=128, width_2=256,
                      width_3=256, out=1280),
}
# a model predicts (x - x0 * a) / b of its noisy x; an error of the estimated x0 counts 1 / b^2, as the reference has it
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
MAX_GRADIENT_NORM = 1.0
# what our files say of themselves: a family's name, the place where control enters, and difference or replace
FAMILY_KEY, PLACE_KEY, MODE_KEY = "controlnext.family", "controlnext.place", "controlnext.unet"
SCALED_LAYOUTS = ("mid", "video_mid")  # whose files always hold the number ``scale``; others do if it is not 1


def new_module(family: Family, seed: int = 0, zero_convolution: bool = False, operations=nn,
               **widths: int) -> ControlNeXtModule:
    """A fresh module of a family in float32, initialised as the reference does: every layer as torch has it.

    Args:
        family: its layout gives the reference's widths and whether there is a stem.
        seed: of the weights; torch's own random numbers are left as they were.
        zero_convolution: start with a last convolution of zeros, for training without cross normalization.
        operations: where layers come from; they must initialise themselves, as ``torch.nn`` does.
        widths: other widths than the reference's: ``out`` (the denoiser's channels at the place of injection),
            ``frequencies``, ``time``, ``stem_0``, ``stem_1``, ``width_0`` ...; above 32 they must be multiples of 32.

    Raises:
        ValueError: a width that the family's layout does not have.
    """
    reference = WIDTHS[family.layout]
    if unknown := widths.keys() - reference.keys():
        raise ValueError(f"{min(unknown)} is not a width of {family.name}; it has {', '.join(reference)}.")
    widths = {**reference, **widths}
    stages = sum(name.startswith("width_") for name in widths) - 1
    keys = ["embedding.0.weight"] if "stem_0" in widths else []
    keys += [f"down_res.{i}.conv_shortcut.weight" for i in range(stages)
             if widths[f"width_{i}"] != widths[f"width_{i + 1}"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = ControlNeXtModule(widths, keys, operations=operations, dtype=torch.float32)
    if zero_convolution:
        for parameter in module.mid_convs[1].parameters():
            nn.init.zeros_(parameter)
    return module


def control_features(module: ControlNeXtModule, family: Family, image: torch.Tensor, timestep: torch.Tensor,
                     size: tuple[int, int], zero_convolution: bool = False, together: bool = False) -> torch.Tensor:
    """Features (N, out, H, W) at the denoiser's size, standardized unless ``zero_convolution``; differentiable.

    The same steps as in sampling, so that what is trained is what is applied.

    Args:
        image: control images (N, 3, h, w) in [0, 1], RGB, in the compute dtype.
        timestep: the denoiser's own, (N,) or (1,) for all.
        size: (H, W) of the denoiser's features at the place of injection.
        together: the images share one latent frame of a video: (1, out, H, W) of their mean.
    """
    part = module.image_part(image, family.stem_padding, family.stem_pool)
    features = module.timestep_part(part, timestep, size if family.pool_first or zero_convolution else None)
    if together:
        features = features.mean(0, keepdim=True)
    return features if zero_convolution else fit(features, size, family.pool_first, family.eps)


def add_features(h: torch.Tensor, features: torch.Tensor, gain: float | torch.Tensor = 1.0,
                 zero_convolution: bool = False) -> torch.Tensor:
    """Denoiser features (N, C, H, W) with ``control_features`` added: cross-normalized to h, or as they are."""
    if zero_convolution:
        return h + gain * features
    return add_controls(h, [(features[None], h.new_ones(1, 1, 1, 1, 1) * gain)])


def select_weights(names: Mapping[str, T], pattern: str) -> dict[str, T]:
    """The {diffusers name: where the denoiser has it} whose name holds the regular expression ``pattern``."""
    return {name: key for name, key in names.items() if re.search(pattern, name)}


def draw_levels(rows: int, levels: int, prediction: str, generator: torch.Generator) -> torch.Tensor:
    """Which of a sampling's noise levels each row of a batch gets, (rows,), 0 is the one of least noise.

    Each is as likely as any other, as the reference has it. Of flow models the middle ones are likelier: logit-normal
    with mean 0 and deviation 1, as SD3 was trained (arXiv 2403.03206); the levels themselves follow the model's shift.
    """
    if prediction == "flow":
        return (torch.randn(rows, generator=generator).sigmoid() * levels).long().clamp(max=levels - 1)
    return torch.randint(levels, (rows,), generator=generator)


def draw_sigmas(rows: int, mean: float, deviation: float, limits: tuple[float, float],
                generator: torch.Generator) -> torch.Tensor:
    """Noise levels (rows,) of a continuous model: log-normal, as EDM draws them (arXiv 2206.00364), within limits."""
    return (mean + deviation * torch.randn(rows, generator=generator)).exp().clamp(*limits)


def prediction_loss(denoised: torch.Tensor, clean: torch.Tensor, sigma: torch.Tensor, prediction: str,
                    min_snr_gamma: float = 0.0) -> torch.Tensor:
    """Mean squared error (N,) of what the model predicts, told from its estimate of the clean latents.

    Equal to ``mse(epsilon, noise)``, ``mse(v, alpha * noise - sigma * x0)`` or ``mse(velocity, noise - x0)`` of the
    reference, sample by sample. With min-SNR weighting (arXiv 2303.09556) an error of the clean latents counts
    min(signal-to-noise ratio, gamma) instead, whatever the model predicts.

    Args:
        denoised: the model's estimate of ``clean``, (N, ...).
        clean: the latents before noise, (N, ...).
        sigma: (N,) noise level: of x0 + sigma * noise, for flow of (1 - sigma) * x0 + sigma * noise. Above 0.
        prediction: epsilon, v or flow.
        min_snr_gamma: above 0, or 0 for the reference's loss.
    """
    if min_snr_gamma:
        weight = SIGNAL_TO_NOISE[prediction](sigma).clamp(max=min_snr_gamma)
    else:
        weight = LOSS_WEIGHTS[prediction](sigma)
    return weight * (denoised.float() - clean.float()).square().flatten(1).mean(1)


def draw_rows(buckets: Sequence[Sequence[int]], batch_size: int, generator: torch.Generator) -> list[int]:
    """The samples of one batch: all of one bucket (of one size), drawn by its share of all; none twice."""
    shares = torch.tensor([float(len(bucket)) for bucket in buckets])
    bucket = buckets[int(torch.multinomial(shares, 1, generator=generator))]
    return [bucket[i] for i in torch.randperm(len(bucket), generator=generator)[:batch_size].tolist()]


def drop_captions(rows: int, share: float, generator: torch.Generator) -> list[bool]:
    """Which rows of a batch get the empty caption; each does with probability ``share``, in [0, 1]."""
    return (torch.rand(rows, generator=generator) < share).tolist()


def with_scale(module: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A module's state dict with the scale, as a file holds it; one that was trained is there already and stays."""
    return {"scale": torch.tensor(scale), **module}


def learn_scale(module: ControlNeXtModule, scale: float) -> None:
    """Make the scale a parameter ``module.scale``, which is trained, as the reference has it in SCALED_LAYOUTS."""
    module.scale = nn.Parameter(torch.tensor(scale))


def reference_files(module: Mapping[str, torch.Tensor], family: Family | None, scale: float,
                    differences: Mapping[str, torch.Tensor], place: str | None = None) -> dict[str, tuple[dict, dict]]:
    """{file name: (tensors, metadata)} as the reference implementation names and reads them.

    Args:
        module: the module's state dict.
        family: None when it is not known; the files then do not tell it.
        scale: the learned scale; the reference's own code reads no other than 1 outside SCALED_LAYOUTS.
        differences: {diffusers name: tensor}; without any there is one file.
        place: where control enters the denoiser; None when it is not known.
    """
    held = scale != 1 or layout_of(list(module)) in SCALED_LAYOUTS
    tensors = with_scale(module, scale) if held else dict(module)
    metadata = {FAMILY_KEY: family.name} if family else {}
    if place:
        metadata[PLACE_KEY] = place
    files = {"controlnet.safetensors": (tensors, metadata)}
    if differences:
        files["unet.safetensors"] = (dict(differences), {**metadata, MODE_KEY: "difference"})
    return files


class Training:
    """What a training carries from step to step, and can put down and take up again without changing a bit.

    Args:
        module: it becomes trainable, and is trained in place; so does its scale, after ``learn_scale``.
        differences: {name: tensor} of UNet differences to go on from, zeros for a start; copied to float32.
        learning_rate, unet_learning_rate: of AdamW. The weights decay to zero, the differences so to the base weights.
        scale_learning_rate: of the module's scale, which does not decay.
        ema: decay of a moving average of everything that is trained, 0 for none.
        seed: of ``generator``, from which all random numbers of a training are to be drawn.
        warmup_steps: first steps, in which the learning rates rise to what they are.
        accumulation: losses whose mean a step goes down.

    Attributes:
        learned: {name: parameter} of the module, in the optimizer's order.
        differences: {name: float32 parameter}.
        step: updates so far.
        losses: one number an update.
    """

    def __init__(self, module: ControlNeXtModule, differences: Mapping[str, torch.Tensor] | None = None,
                 learning_rate: float = 1e-4, unet_learning_rate: float = 3e-5, ema: float = 0.0, seed: int = 0,
                 warmup_steps: int = 0, accumulation: int = 1, scale_learning_rate: float = 1e-3):
        self.module = module.requires_grad_(True)
        self.differences = {name: nn.Parameter(value.detach().float().clone())
                            for name, value in (differences or {}).items()}
        layers = dict(module.named_parameters())
        scale = {"scale": layers.pop("scale")} if "scale" in layers else {}
        self.learned = scale | layers
        groups = [{"params": list(scale.values()), "lr": scale_learning_rate, "weight_decay": 0.0},
                  {"params": list(layers.values()), "lr": learning_rate},
                  {"params": list(self.differences.values()), "lr": unet_learning_rate}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.warmup_steps, self.accumulation = warmup_steps, accumulation
        self.ema = ema
        self.average = [parameter.detach().clone() for parameter in self.parameters()] if ema else None
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.losses: list[float] = []

    def parameters(self) -> Iterable[nn.Parameter]:
        """All that is trained, in the optimizer's order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def update(self, loss_of_batch: Callable[[], torch.Tensor]) -> float:
        """One step of the optimizer; returns the mean loss. Whatever ends it early, nothing was changed.

        Args:
            loss_of_batch: gives a scalar loss, of another batch at every call.

        Raises:
            ValueError: a loss is not a finite number.
        """
        before, values = self.generator.get_state(), []
        try:
            for _ in range(self.accumulation):
                loss = loss_of_batch()
                values.append(loss.item())
                if not math.isfinite(values[-1]):
                    raise ValueError(f"learning_rate: the loss is {values[-1]} after {self.step} steps; train with "
                                     f"lower learning rates or in float32.")
                (loss / self.accumulation).backward()
        except BaseException:
            self.optimizer.zero_grad()
            self.generator.set_state(before)
            raise
        value = fmean(values)
        nn.utils.clip_grad_norm_(self.parameters(), MAX_GRADIENT_NORM)
        warmth = min(1.0, (self.step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * warmth
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters()], 1 - self.ema)
        self.step += 1
        self.losses.append(value)
        return value

    def weights(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(module state dict, differences) to apply or save: the moving average where there is one. Copies."""
        values = iter([value.detach().clone() for value in self.average or self.parameters()])
        return ({name: next(values) for name in self.learned},
                {name: next(values) for name in self.differences})

    def state_dict(self) -> dict:
        """Everything that the next step depends on, as tensors, numbers, lists and dicts of them; a copy."""
        return copy.deepcopy({
            "module": self.module.state_dict(),
            "differences": {name: value.detach() for name, value in self.differences.items()},
            "optimizer": self.optimizer.state_dict(), "average": self.average,
            "generator": self.generator.get_state(), "step": self.step, "losses": self.losses,
        })

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state_dict`` of a Training of the same module and differences; learning rates stay one's own.

        Raises:
            ValueError: the state is of another module, other differences or without the moving average; says which.
        """
        shapes = {key: value.shape for key, value in self.module.state_dict().items()}
        if ("scale" in shapes) != ("scale" in state["module"]):
            raise ValueError("only one of them trains the scale")
        if shapes != {key: value.shape for key, value in state["module"].items()}:
            raise ValueError("it is of a module with other widths")
        if self.differences.keys() != state["differences"].keys():
            raise ValueError(f"it trains {len(state['differences'])} UNet weights, this training "
                             f"{len(self.differences)}")
        if (self.average is None) != (state["average"] is None):
            raise ValueError("only one of them keeps a moving average")
        self.module.load_state_dict(state["module"])
        with torch.no_grad():
            for name, value in self.differences.items():
                value.copy_(state["differences"][name])
            for value, saved in zip(self.average or [], state["average"] or [], strict=True):
                value.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.losses = state["step"], list(state["losses"])
