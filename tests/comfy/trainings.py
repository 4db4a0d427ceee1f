"""Trainings as the node makes them, whole and, of transformers, step by step."""

from contextlib import contextmanager

import torch
from sampling import cond, latent
from tokens import BASES, new_controlnext, picture_for

RATE = 3e-3  # of learning


def train_on(run, model, data: dict[str, list], settings: dict) -> tuple:
    """The outputs of Train ControlNeXt, which takes lists: those of the data, and one of each setting but of None."""
    return run("ControlNeXtTrain", model=[model], **data,
               **{name: [value] for name, value in settings.items() if value is not None})


def weights(controlnext) -> dict[str, torch.Tensor]:
    """All that a training changes."""
    found = controlnext.loaded.checkpoint
    return {**found.state_dict, **controlnext.unet_differences, "scale": torch.tensor(found.scale)}


def samples(base: str, model, frames: int = 1) -> dict:
    """One picture, or one video of so many latent frames, as the node takes it."""
    row = BASES[base]
    shape = list(latent(base, 1, *[4 * row.patch] * 2).shape)
    shape[2:-2] = [frames] * len(shape[2:-2])
    return {"latents": [{"samples": torch.randn(shape, generator=torch.Generator().manual_seed(2))}],
            "conditioning": [cond(model)], "images": [picture_for(base, 2, row.images * (frames - 1) + 1)]}


@contextmanager
def running(pack, base: str, model, frames: int = 1, checkpointing: bool = True):
    """(a Session on ``samples``, its Training) with control after the first block if it can enter there."""
    data = pack("nodes.training.data").samples_for(model, *samples(base, model, frames).values())
    settings = pack("nodes.training.settings").TrainSettings(
        learning_rate=RATE, unet_learning_rate=RATE, scale_learning_rate=0.0, training_dtype="fp32",
        inject_at=BASES[base].places[:2][-1], gradient_checkpointing=checkpointing)
    with pack("nodes.training.session").Session(model, data, settings, new_controlnext(pack, base)) as session:
        yield session, session.training
