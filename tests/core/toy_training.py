"""A training on a toy denoiser and fixed data, which processes of their own can run too."""

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import nn

from controlnext_core.families import FAMILIES
from controlnext_core.features import add_features, control_features
from controlnext_core.losses import prediction_loss
from controlnext_core.module import new_module
from controlnext_core.ranks import Ranks
from controlnext_core.training import Training, draw_rows

SMALL = dict(frequencies=8, time=16, stem_0=8, stem_1=8, width_0=16, width_1=16, width_2=32, out=12)


class Denoiser(nn.Module):
    """Two convolutions, with the control between them."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.before, self.after = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x, difference, control):
        return F.conv2d(control(self.before(x)), self.after.weight + difference, self.after.bias, padding=1)


def one_step(training: Training, zero_convolution: bool = False) -> float:
    """A training step of fixed data, all its random numbers from the training's own generator."""
    return training.update(lambda: loss_of_batch(training, zero_convolution))


def loss_of_batch(training: Training, zero_convolution: bool = False) -> torch.Tensor:
    denoiser, family = Denoiser(), FAMILIES["sdxl"]
    data = torch.Generator().manual_seed(2)
    images, latents = torch.rand(6, 3, 32, 32, generator=data), torch.randn(6, 4, 4, 4, generator=data)
    rows = draw_rows([range(4), range(4, 6)], 2, training.generator)
    noise = torch.randn(2, 4, 4, 4, generator=training.generator)
    sigma = torch.rand(2, generator=training.generator) + 0.1
    parts = [training.module.image_part(images[rows], family.stem_padding, family.stem_pool)]
    features = control_features(training.module, family, parts, sigma, (4, 4), zero_convolution)
    x = latents[rows] + sigma[:, None, None, None] * noise
    gain = 1.0 if training.module.scale is None else training.module.scale
    out = denoiser(x, training.differences["after"], lambda h: add_features(h, features, gain, zero_convolution))
    return prediction_loss(x - sigma[:, None, None, None] * out, latents[rows], sigma, "epsilon").mean()


def small_training(ema: float = 0.0, zero_convolution: bool = False, scale: float | None = None,
                   **settings) -> Training:
    module = new_module(FAMILIES["sdxl"], 3, zero_convolution, scale=scale, **SMALL)
    return Training(module, {"after": torch.zeros(4, 12, 3, 3)}, 1e-3, 1e-3, ema, seed=4, **settings)


def trained(steps: int, state: dict | None = None, **settings) -> dict:
    """The state of a training after so many steps, by all the processes that were started."""
    training = small_training(ranks=Ranks(), scale=1.0, **settings)
    if state:
        training.load_state_dict(state)
    while training.step < steps:
        training.update(lambda: loss_of_batch(training), lambda: loss_of_batch(training))
    return training.state_dict()


def failed() -> list:
    """[what the first step says, steps done] where the loss of all processes but the first is no number."""
    training = small_training(ranks=Ranks())
    factor = float("nan") if distributed.get_rank() else 1.0
    try:
        training.update(lambda: factor * loss_of_batch(training), lambda: loss_of_batch(training))
    except ValueError as error:
        return [str(error), training.step]
    return ["nothing", training.step]


def in_process(rank: int, count: int, work, folder: str) -> None:
    """Do some work as one of so many processes, and write what it gives."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting_{count}", rank=rank, world_size=count)
    torch.save(work(), f"{folder}/of_{count}_{rank}.pt")
    distributed.destroy_process_group()
