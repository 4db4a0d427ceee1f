"""Trainings as the node makes them, whole and, of transformers, step by step."""

from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from sampling import cond, latent
from tokens import BASES, new_controlnext, picture_for

from controlnext_core.bases import BASES as ROWS
from controlnext_core.training import select_weights
from controlnext_core.unet_keys import targets_of

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
    """(a Run on ``samples``, its Training) as the node makes them, with control after the first block if it can."""
    training_run, training = pack("nodes.training.session"), pack("controlnext_core.training")
    data = pack("nodes.training.data").Samples(*samples(base, model, frames).values(), None, BASES[base].ratio,
                                               images_a_frame=BASES[base].images)
    with torch.inference_mode(False), pytest.MonkeyPatch.context() as patch:
        patch.setattr("comfy.model_management.in_training", True)
        control = pack("nodes.training.start").start_control(model, new_controlnext(pack, base), 0,
                                                                       BASES[base].places[:2][-1])
        shapes = {key: tuple(value.shape) for key, value in model.model.diffusion_model.state_dict().items()}
        targets = select_weights(targets_of(shapes), ROWS[base].unet_pattern)
        state = training.Training(control.module, {name: torch.zeros(target.shape(shapes[target.key]))
                                                   for name, target in targets.items()}, RATE, RATE)
        clone = training_run.trainable_clone(
            model, control, {targets[name]: value for name, value in state.differences.items()}, torch.float32,
            checkpointing)
        try:
            comfy.model_management.load_models_gpu([clone], memory_required=1e20, force_full_load=True)
            clone.pre_run()
            yield training_run.Session(clone, control, state, data, 1, 0.0), state
        finally:
            clone.cleanup()
            comfy.model_management.unload_all_models()
            for layer in clone.model.modules():
                comfy.model_patcher.wipe_lowvram_weight(layer)
