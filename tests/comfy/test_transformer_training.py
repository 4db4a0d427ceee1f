"""Train ControlNeXt on every transformer, on small random models of the real classes, and what comes of it."""

from pathlib import Path
from statistics import mean

import folder_paths
import pytest
import torch
from models import TRANSFORMERS
from sampling import TRAINING, conds
from tokens import VIDEOS, drawn, new_controlnext, picture_for
from trainings import RATE, running, samples, train_on

from controlnext_core.bases import BASES
from controlnext_core.training import select_weights
from controlnext_core.unet_keys import targets_of

SETTINGS = TRAINING | dict(steps=6, learning_rate=RATE, unet_learning_rate=RATE)
OUTPUT = Path(folder_paths.get_output_directory())


@pytest.fixture(scope="module", params=TRANSFORMERS)
def base(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(run, pack, base, model):
    """(the node's outputs on one fixed picture, the MODEL's weights before it)."""
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    settings = SETTINGS | {"controlnext": new_controlnext(pack, base), "filename_prefix": base}
    with torch.inference_mode(False):
        return train_on(run, model, samples(base, model), settings), before


def test_training_reaches_every_tensor_and_leaves_the_model_as_it_was(base, model, trained):
    (controlnext, loss_map, steps, controlled), before = trained
    assert steps == len(loss_map["loss"]) == 6
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    targets = targets_of({key: value.shape for key, value in model.model.diffusion_model.state_dict().items()})
    expected = select_weights(targets, BASES[base].unet_pattern)
    assert controlnext.unet_differences.keys() == expected.keys()
    assert len(expected) >= 3  # of every block
    weights = {**controlnext.loaded.checkpoint.state_dict, **controlnext.unet_differences}
    assert [name for name, value in weights.items() if not value.any()] == []
    assert controlled.patches.keys() == {f"diffusion_model.{target.key}" for target in expected.values()}


@pytest.mark.parametrize(("base", "frames", "checkpointing"), [
    *((base, 1, True) for base in TRANSFORMERS), *((base, 3, True) for base in VIDEOS),
    ("flux", 1, False)], indirect=["base"])
def test_gradients_are_those_of_the_loss(pack, base, model, frames, checkpointing):
    """The loss changes along them as much as they say."""
    with running(pack, base, model, frames, checkpointing) as (run, state):
        drawn_before = state.generator.get_state()
        run.loss_of_batch().backward()
        gradients = [parameter.grad.clone() for parameter in state.parameters()]
        norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5

        def loss_at(distance: float) -> float:
            state.generator.set_state(drawn_before)
            for parameter, gradient in zip(state.parameters(), gradients, strict=True):
                parameter.data += distance / norm * gradient
            with torch.no_grad():
                return float(run.loss_of_batch())
        step = 2e-3
        difference = loss_at(step) - loss_at(-2 * step)
    assert all(gradient.any() for gradient in gradients)
    assert difference / (2 * step) == pytest.approx(norm, rel=0.03)


def test_sixty_steps_at_most_halve_the_loss_of_a_fixed_batch(pack, base, model):
    """Of the same picture, noise and timestep at every step."""
    def halved() -> bool:
        return mean(state.losses[-5:]) < 0.5 * state.losses[0]
    with running(pack, base, model, checkpointing=False) as (run, state):
        drawn_before = state.generator.get_state()
        for _ in range(60):
            state.generator.set_state(drawn_before)
            run.step()
            if halved():
                break
    assert halved(), state.losses


def test_what_was_trained_draws_the_same_from_its_files_and_as_a_lora(base, model, run, trained, apply, comfy_nodes,
                                                                     models_folder):
    (controlnext, _, _, with_weights), _ = trained
    comfy_nodes["ControlNeXtSave"].execute(controlnext, f"controlnext/{base}")
    saved = max((OUTPUT / "controlnext").glob(f"{base}_*_"))
    for file in ("controlnet", "unet"):
        (saved / f"{file}.safetensors").rename(models_folder / "controlnext" / f"{base}_{file}.safetensors")
    loaded = run("ControlNeXtLoader", controlnext_name=f"{base}_controlnet.safetensors", variant="auto")
    assert loaded.variant == base and loaded.place_name == "tokens"
    by_file = run("ControlNeXtUNetLoader", model=model, unet_name=f"{base}_unet.safetensors", strength=1.0, mode="auto")
    folder_paths.add_model_folder_path("loras", str(OUTPUT / "loras"))  # as ComfyUI's main.py does
    output = comfy_nodes["ControlNeXtSaveAsLoRA"].execute(f"{base}_unet.safetensors", model, f"loras/{base}", 0)
    lora = Path(output.ui.as_dict()["text"][0].split(":")[0]).name
    by_lora = run("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    expected, from_file, from_lora, plain = (
        drawn(base, apply(one, module, picture_for(base)), *conds(model)) for one, module in (
            (with_weights, controlnext), (by_file, loaded), (by_lora, loaded), (model, loaded)))
    assert torch.equal(from_file, expected)
    assert torch.equal(from_lora, expected)
    assert not torch.equal(plain, expected)
