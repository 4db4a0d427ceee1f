"""Train ControlNeXt on every transformer, on small random models of the real classes, and what comes of it."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import pytest
import torch
from models import TRANSFORMERS, small_transformer
from sampling import TRAINING, cond, conds, latent, picture
from tokens import BASES, drawn, new_controlnext

from controlnext_core.training import UNET_PATTERNS, select_weights
from controlnext_core.unet_keys import targets_of

SETTINGS = TRAINING | dict(steps=6, learning_rate=3e-3, unet_learning_rate=3e-3)
OUTPUT = Path(folder_paths.get_output_directory())


@pytest.fixture(scope="module", params=TRANSFORMERS)
def base(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(base):
    return small_transformer(base)


def samples(base: str, model) -> dict:
    """One picture, as the node takes it."""
    side = 64 // BASES[base].ratio
    empty = latent(base, 1, side, side)
    if empty.ndim == 5:
        empty = empty[:, :, :1]
    return {"latents": [{"samples": torch.randn(empty.shape, generator=torch.Generator().manual_seed(2))}],
            "conditioning": [cond(model)], "images": [picture(2)]}


@pytest.fixture(scope="module")
def train(run, pack, base, model):
    """train(**settings): the node's outputs on one fixed picture."""
    def run_training(**settings):
        settings = SETTINGS | {"filename_prefix": base} | settings
        with torch.inference_mode(False):
            return run("ControlNeXtTrain", model=[model], **samples(base, model),
                       controlnext=[new_controlnext(pack, base)],
                       **{name: [value] for name, value in settings.items()})
    return run_training


@pytest.fixture(scope="module")
def trained(train):
    return train()


def test_training_lowers_the_loss_and_reaches_every_tensor(base, model, train, trained):
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    untrained = train(learning_rate=0.0, unet_learning_rate=0.0)[1]["loss"]
    controlnext, loss_map, steps, controlled = trained
    assert steps == 6
    assert sum(loss_map["loss"][3:]) < 0.95 * sum(untrained[3:])  # of the same noise and timesteps
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    targets = targets_of({key: value.shape for key, value in model.model.diffusion_model.state_dict().items()})
    expected = select_weights(targets, UNET_PATTERNS[base])
    assert controlnext.unet_differences.keys() == expected.keys()
    assert len(expected) >= 3  # of every block
    weights = {**controlnext.loaded.checkpoint.state_dict, **controlnext.unet_differences}
    assert [name for name, value in weights.items() if not value.any()] == []
    assert controlled.patches.keys() == {f"diffusion_model.{target.key}" for target in expected.values()}


@pytest.mark.parametrize(("base", "checkpointing"), [*((base, True) for base in TRANSFORMERS), ("flux", False)],
                         indirect=["base"])
def test_gradients_are_those_of_the_loss(pack, base, model, monkeypatch, checkpointing):
    """The loss changes along them as much as they say."""
    monkeypatch.setattr("comfy.model_management.in_training", True)
    training_run, training = pack("nodes.training_run"), pack("controlnext_core.training")
    given = samples(base, model)
    data = pack("nodes.training_data").Samples(*given.values(), None, BASES[base].ratio)
    with torch.inference_mode(False):
        control = pack("nodes.train")._start(model, None, 0, "block_0")
        shapes = {key: tuple(value.shape) for key, value in model.model.diffusion_model.state_dict().items()}
        targets = select_weights(targets_of(shapes), UNET_PATTERNS[base])
        state = training.Training(control.module, {name: torch.zeros(target.shape(shapes[target.key]))
                                                   for name, target in targets.items()})
        clone = training_run.trainable_clone(
            model, control, {targets[name]: value for name, value in state.differences.items()}, torch.float32,
            checkpointing)
        run = training_run.Run(clone, control, state, data, 1, 0.0)
        try:
            comfy.model_management.load_models_gpu([clone], memory_required=1e20, force_full_load=True)
            clone.pre_run()
            drawn_before = state.generator.get_state()
            run._loss_of_batch().backward()
            gradients = [parameter.grad.clone() for parameter in state.parameters()]
            norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5

            def loss_at(distance: float) -> float:
                state.generator.set_state(drawn_before)
                for parameter, gradient in zip(state.parameters(), gradients, strict=True):
                    parameter.data += distance / norm * gradient
                with torch.no_grad():
                    return float(run._loss_of_batch())
            step = 2e-3
            difference = loss_at(step) - loss_at(-2 * step)
        finally:
            clone.cleanup()
            comfy.model_management.unload_all_models()
            for layer in clone.model.modules():
                comfy.model_patcher.wipe_lowvram_weight(layer)
    assert all(gradient.any() for gradient in gradients)
    assert difference / (2 * step) == pytest.approx(norm, rel=0.03)


def test_what_was_trained_draws_the_same_from_its_files_and_as_a_lora(base, model, run, trained, apply, comfy_nodes,
                                                                     models_folder):
    controlnext, _, _, with_weights = trained
    comfy_nodes["ControlNeXtSave"].execute(controlnext, f"controlnext/{base}")
    saved = max((OUTPUT / "controlnext").glob(f"{base}_*_"))
    for file in ("controlnet", "unet"):
        (saved / f"{file}.safetensors").rename(models_folder / "controlnext" / f"{base}_{file}.safetensors")
    loaded = run("ControlNeXtLoader", controlnext_name=f"{base}_controlnet.safetensors", variant="auto")
    assert loaded.variant == base and loaded.place == "tokens"
    by_file = run("ControlNeXtUNetLoader", model=model, unet_name=f"{base}_unet.safetensors", strength=1.0, mode="auto")
    folder_paths.add_model_folder_path("loras", str(OUTPUT / "loras"))  # as ComfyUI's main.py does
    output = comfy_nodes["ControlNeXtSaveAsLoRA"].execute(f"{base}_unet.safetensors", model, f"loras/{base}", 0)
    lora = Path(output.ui.as_dict()["text"][0].split(":")[0]).name
    by_lora = run("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)
    expected, from_file, from_lora, plain = (
        drawn(base, apply(one, module, picture()), *conds(model)) for one, module in (
            (with_weights, controlnext), (by_file, loaded), (by_lora, loaded), (model, loaded)))
    assert torch.equal(from_file, expected)
    assert torch.equal(from_lora, expected)
    assert not torch.equal(plain, expected)
