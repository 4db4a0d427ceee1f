"""Training ControlNeXt: the module, optionally with differences of a few UNet weights, on a frozen denoiser.

A step: draw samples (``draw_rows``) and noise levels (``losses``), noise the latents, run the denoiser with the control
(``features``) added, and call ``Training.update`` with the loss (``losses.prediction_loss``).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

import torch
from torch import nn

from .checkpoint import is_whole
from .layouts import solve_widths
from .module import ControlNeXtModule
from .patterns import matching
from .ranks import Ranks

T = TypeVar("T")
MAX_GRADIENT_NORM = 1.0
LOWER_RATES = "train with lower learning rates or in float32"


def select_weights(names: Mapping[str, T], pattern: str) -> dict[str, T]:
    """The {diffusers name: where the denoiser has it} whose name holds the regular expression ``pattern``.

    Raises:
        ValueError: of ``patterns.matching``.
    """
    return {name: names[name] for name in matching(names, pattern)}


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
        accumulation: losses whose mean a step goes down, in each of the ranks.
        ranks: the processes that train together; each averages its gradients with the others' before a step.

    Attributes:
        learned: {name: parameter} of the module, in the order of the optimizer.
        differences: {name: float32 parameter}.
        step: updates so far.
        losses: one number an update.
    """

    def __init__(self, module: ControlNeXtModule, differences: Mapping[str, torch.Tensor] | None = None,
                 learning_rate: float = 1e-4, unet_learning_rate: float = 3e-5, ema: float = 0.0, seed: int = 0,
                 warmup_steps: int = 0, accumulation: int = 1, scale_learning_rate: float = 1e-3,
                 ranks: Ranks | None = None):
        self.module = module.requires_grad_(True)
        self.differences = {name: nn.Parameter(value.detach().float().clone())
                            for name, value in (differences or {}).items()}

        layers = dict(module.named_parameters())
        scale = {"scale": layers.pop("scale")} if "scale" in layers else {}
        self.learned = scale | layers

        groups = {
            "scale_learning_rate": {"params": list(scale.values()), "lr": scale_learning_rate, "weight_decay": 0.0},
            "learning_rate": {"params": list(layers.values()), "lr": learning_rate},
            "unet_learning_rate": {"params": list(self.differences.values()), "lr": unet_learning_rate}}
        groups = {name: group for name, group in groups.items() if group["params"]}
        self.rates = {name: group["lr"] for name, group in groups.items()}
        # fused, an update needs no memory, so that none can run out in its middle
        self.optimizer = torch.optim.AdamW(list(groups.values()), fused=True)

        self.warmup_steps, self.accumulation = warmup_steps, accumulation
        self.ranks = ranks or Ranks()
        self.ema = ema
        self.average = [parameter.detach().clone() for parameter in self.parameters()] if ema else None
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.losses: list[float] = []

    def rates_at(self, step: int) -> dict[str, float]:
        """{name: learning rate} of what is trained, in the update that follows so many others."""
        warmth = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return {name: rate * warmth for name, rate in self.rates.items()}

    def parameters(self) -> Iterable[nn.Parameter]:
        """Everything that is trained, in the order of the optimizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def update(self, loss_of_batch: Callable[[], torch.Tensor], pass_over: Callable[[], None] | None = None) -> float:
        """One step of the optimizer; returns the mean loss. If anything ends it early, nothing was changed.

        Args:
            loss_of_batch: gives a scalar loss, of another batch at every call.
            pass_over: draws from ``generator`` what a batch of another rank draws; needed with several.

        Raises:
            ValueError: a loss or the norm of the gradients is not a finite number.
            RuntimeError: another rank is gone.
        """
        before, losses = self.generator.get_state(), []
        try:
            for batch in range(self.accumulation * self.ranks.count):
                if batch % self.ranks.count != self.ranks.own:
                    pass_over()
                    continue
                loss = loss_of_batch()
                losses.append(loss.item())
                (loss / self.accumulation).backward()

            parameters = self.parameters()
            mean_loss = torch.tensor([fmean(losses)], dtype=torch.float32, device=parameters[0].device)
            self.ranks.average([mean_loss, *(value.grad for value in parameters if value.grad is not None)])
            mean_loss = fmean(losses) if self.ranks.count == 1 else mean_loss.item()
            norm = nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            for what, value in (("the loss", mean_loss), ("the gradients' norm", norm.item())):
                if not math.isfinite(value):
                    raise ValueError(f"learning_rate: {what} is {value} after {self.step} steps; {LOWER_RATES}.")

            for group, rate in zip(self.optimizer.param_groups, self.rates_at(self.step).values(), strict=True):
                group["lr"] = rate
            self.optimizer.step()
        except BaseException:
            self.optimizer.zero_grad()
            self.generator.set_state(before)
            raise

        self.optimizer.zero_grad()
        if self.average is not None:
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters()], 1 - self.ema)

        self.step += 1
        self.losses.append(mean_loss)
        return mean_loss

    def weights(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(module state dict, differences) to apply or save, on the host: the moving average where there is one.

        Raises:
            ValueError: the last step left numbers that are not finite.
        """
        trained = [_on_host(value) for value in self.average or self.parameters()]
        if not all(value.isfinite().all() for value in trained):
            raise ValueError(f"learning_rate: what was trained is not finite after {self.step} steps; {LOWER_RATES}.")
        values = iter(trained)
        return ({name: next(values) for name in self.learned},
                {name: next(values) for name in self.differences})

    def state_dict(self) -> dict:
        """Everything that the next step depends on, as tensors, numbers, lists and dicts of them.

        A copy on the host, made tensor by tensor. ``STATE`` says what each entry holds, ``digest`` stands for all of
        them.
        """
        optimizer = self.optimizer.state_dict()
        moments = {index: _all_on_host(of_one) for index, of_one in optimizer["state"].items()}
        state = {
            "module": _all_on_host(self.module.state_dict()), "differences": _all_on_host(self.differences),
            "optimizer": {**optimizer, "state": moments},
            "average": self.average and [_on_host(value) for value in self.average],
            "generator": self.generator.get_state(), "step": self.step, "losses": list(self.losses),
        }
        return state | {"digest": digest_of(state)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state_dict`` of a Training of the same module and differences; learning rates stay one's own.

        Args:
            state: has no ``faulty_entry``.

        Raises:
            ValueError: the state is of another module, of other differences or of another order of them, or without the
                moving average; says which.
        """
        shapes = {key: value.shape for key, value in self.module.state_dict().items()}
        if ("scale" in shapes) != ("scale" in state["module"]):
            raise ValueError("only one of them trains the scale")
        if shapes != {key: value.shape for key, value in state["module"].items()}:
            raise ValueError("it is of a module with other widths")
        if self.differences.keys() != state["differences"].keys():
            raise ValueError(f"it trains {len(state['differences'])} UNet weights, this training "
                             f"{len(self.differences)}")
        if list(self.differences) != list(state["differences"]):
            raise ValueError("it trains the same UNet weights in another order")
        if (self.average is None) != (state["average"] is None):
            raise ValueError("only one of them keeps a moving average")

        self.module.load_state_dict(state["module"])
        with torch.no_grad():
            for name, value in self.differences.items():
                value.copy_(state["differences"][name])
            for value, saved in zip(self.average or [], state["average"] or [], strict=True):
                value.copy_(saved)

        # the optimizer changes what it is given in place
        moments = {index: _all_on_host(of_one) for index, of_one in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.generator.set_state(state["generator"])
        self.step, self.losses = state["step"], list(state["losses"])


def faulty_entry(state: Mapping) -> str | None:
    """The first entry that is missing in a state or not as ``Training.state_dict`` gives it; None where all are whole.

    Anything may have been read from a file. Whether a state that is whole fits a Training, ``load_state_dict`` says.
    """
    faulty = next((name for name, is_right in STATE.items() if name not in state or not is_right(state)), None)
    if faulty is None and "digest" in state and state["digest"] != digest_of(state):  # older states have none
        return "digest"
    return faulty


def digest_of(state: Mapping) -> str:
    """The digest of the names and numbers in a state that is whole; settings, as the optimizer's, do not count."""
    moments = state["optimizer"]["state"]
    names = [list(state["module"]), list(state["differences"]), list(moments)]
    tensors = [*state["module"].values(), *state["differences"].values(), *(state["average"] or ()),
               *(tensor for of_one in moments.values() for tensor in of_one.values()), state["generator"]]
    shapes = [tuple(tensor.shape) for tensor in tensors]

    digest = hashlib.blake2b(repr((names, shapes, state["step"], state["losses"])).encode(), digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _all_on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: _on_host(value) for name, value in tensors.items()}


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory."""
    return tensor.detach().to("cpu", copy=True)


def _is_module(state: Mapping) -> bool:
    if not _are_named(state["module"]):
        return False
    try:
        solve_widths({key: tuple(value.shape) for key, value in state["module"].items()})
    except ValueError:
        return False
    return True


def _are_losses(state: Mapping) -> bool:
    losses = state["losses"]
    return (isinstance(losses, list) and len(losses) == state["step"]
            and all(isinstance(loss, float) and math.isfinite(loss) for loss in losses))


def _is_average(state: Mapping) -> bool:
    average, shapes = state["average"], _shapes_of(state)
    return average is None or (isinstance(average, list) and len(average) == len(shapes)
                               and all(map(_is_finite, average, shapes)))


def _is_optimizer(state: Mapping) -> bool:
    """A parameter that no step has reached has no entry."""
    moments = isinstance(state["optimizer"], dict) and state["optimizer"].get("state")
    shapes = dict(enumerate(_shapes_of(state)))
    return isinstance(moments, dict) and moments.keys() <= shapes.keys() and all(
        _are_moments(of_one, shapes[index], state["step"]) for index, of_one in moments.items())


def _are_moments(moments: object, shape: tuple, steps: int) -> bool:
    """Whether this is what AdamW keeps of a parameter of this shape after so many steps at most."""
    shapes = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if not isinstance(moments, dict) or moments.keys() != shapes.keys():
        return False
    if not all(_is_finite(moments[name], shapes[name]) for name in shapes):
        return False
    return bool(0 <= moments["step"] <= steps and (moments["exp_avg_sq"] >= 0).all())


def _is_generator(state: Mapping) -> bool:
    try:
        torch.Generator().set_state(state["generator"])
    except (RuntimeError, TypeError):
        return False
    return True


def _shapes_of(state: Mapping) -> list[tuple]:
    """The shapes of all that is trained, in the optimizer's order."""
    return [tuple(value.shape) for value in (*state["module"].values(), *state["differences"].values())]


def _are_named(tensors: object) -> bool:
    return isinstance(tensors, dict) and all(isinstance(key, str) and _is_finite(value)
                                             for key, value in tensors.items())


def _is_finite(value: object, shape: tuple | None = None) -> bool:
    """Whether this is a float32 tensor, of this shape if one is given, whose numbers are all there and finite."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or not is_whole(value):
        return False
    return shape in (None, tuple(value.shape)) and bool(value.isfinite().all())


# the entries of a state, each looked at when those before it are known to be right
STATE: dict[str, Callable[[Mapping], bool]] = {
    "module": _is_module,
    "differences": lambda state: _are_named(state["differences"]),
    "step": lambda state: type(state["step"]) is int and state["step"] >= 0,
    "losses": _are_losses,
    "average": _is_average,
    "optimizer": _is_optimizer,
    "generator": _is_generator,
}
