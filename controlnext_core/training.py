"""Training ControlNeXt: the module, optionally with differences of a few UNet weights, on a frozen denoiser.

A step: draw samples (``draw_rows``) and noise levels (``losses``), noise the latents, run the denoiser with the control
(``features``) added, and call ``Training.update`` with the loss (``losses.prediction_loss``).
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

import torch
from pydantic_core import SchemaError, SchemaValidator, core_schema
from torch import nn

from .module import ControlNeXtModule
from .sentences import quoted

T = TypeVar("T")
MAX_GRADIENT_NORM = 1.0


def select_weights(names: Mapping[str, T], pattern: str) -> dict[str, T]:
    """The {diffusers name: where the denoiser has it} whose name holds the regular expression ``pattern``.

    Raises:
        ValueError: it is no regular expression, or one with look-around or back-references.
    """
    # pydantic's are Rust's, which end in time in proportion to a name; Python's may never, and nothing can stop them
    try:
        matches = SchemaValidator(core_schema.str_schema(pattern=pattern)).isinstance_python
    except SchemaError as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("error: ").removeprefix("SchemaError: ")
        raise ValueError(f"{quoted(pattern)} cannot be used as a regular expression ({quoted(reason)})") from None
    return {name: key for name, key in names.items() if matches(name)}


def draw_rows(buckets: Sequence[Sequence[int]], batch_size: int, generator: torch.Generator) -> list[int]:
    """Indices of the samples of one batch, none twice: all of one bucket (one size), drawn by its share of all."""
    shares = torch.tensor([float(len(bucket)) for bucket in buckets])
    bucket = buckets[int(torch.multinomial(shares, 1, generator=generator))]
    return [bucket[i] for i in torch.randperm(len(bucket), generator=generator)[:batch_size].tolist()]


def drop_captions(rows: int, share: float, generator: torch.Generator) -> list[bool]:
    """For each row of a batch, whether it gets the empty caption: with probability ``share``, in [0, 1]."""
    return (torch.rand(rows, generator=generator) < share).tolist()


class Training:
    """The state of a training from step to step, which can be saved and loaded again without changing a bit.

    Args:
        module: it becomes trainable, and is trained in place; so is its scale, if it learns one.
        differences: {name: tensor} of UNet differences to go on from, zeros for a start; copied to float32.
        learning_rate, unet_learning_rate: AdamW's, for the module and the differences. Both decay to zero, so the UNet
            decays to its base weights.
        scale_learning_rate: AdamW's for the module's scale, which does not decay.
        ema: decay of a moving average of everything that is trained, 0 for none.
        seed: begins ``generator``, from which all random numbers of a training are to be drawn.
        warmup_steps: first steps, in which the learning rates rise to what they are.
        accumulation: losses whose mean a step goes down.

    Attributes:
        learned: {name: parameter} of the module, in the order of the optimizer.
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
        """Everything that is trained, in the order of the optimizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def update(self, loss_of_batch: Callable[[], torch.Tensor]) -> float:
        """One step of the optimizer; returns the mean loss. If anything ends it early, nothing was changed.

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

        nn.utils.clip_grad_norm_(self.parameters(), MAX_GRADIENT_NORM)
        warmth = min(1.0, (self.step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * warmth

        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters()], 1 - self.ema)

        self.step += 1
        self.losses.append(fmean(values))
        return self.losses[-1]

    def weights(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(module state dict, differences) to apply or save, as copies: the moving average where there is one."""
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
