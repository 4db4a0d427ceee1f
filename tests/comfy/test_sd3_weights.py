"""SD3's weights: their names in diffusers and in ComfyUI, training them along, applying and saving them."""

from pathlib import Path

import comfy.utils
import folder_paths
import pytest
import torch
from models import NARROW, SD35_MEDIUM, sd3_model, small_sd3
from safetensors.torch import save_file
from sampling import TRAINING, cond, conds, latent, picture, sample
from trainings import train_on

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module
from controlnext_core.unet_keys import targets_of

SETTINGS = TRAINING | dict(steps=8, learning_rate=3e-3, unet_learning_rate=3e-3, filename_prefix="sd3")
OUTPUT = Path(folder_paths.get_output_directory())


@pytest.fixture(scope="module", params=[{}, SD35_MEDIUM], ids=["SD3", "SD3.5 medium"])
def sd3(request):
    return small_sd3(**request.param)


@pytest.fixture
def train(run, pack):
    """train(model, **settings): the node's outputs on one fixed picture."""
    def run_training(model, **settings):
        module = new_module(FAMILIES["sd3"], out=192, **NARROW)
        controlnext = pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), "sd3", "small", {})
        latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
        data = {"latents": [{"samples": latent}], "conditioning": [cond(model)], "images": [picture(2)]}
        with torch.inference_mode(False):
            return train_on(run, model, data, SETTINGS | {"controlnext": controlnext} | settings)
    return run_training


@pytest.mark.parametrize("changes", [{}, SD35_MEDIUM, {"depth": 24}], ids=["small", "medium", "24 blocks"])
def test_names_agree_with_comfyui_s_own_map_in_both_directions(changes):
    with torch.device("meta"):
        model = sd3_model(**changes).model
    shapes = {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    targets = targets_of(shapes)
    theirs = comfy.utils.mmdit_to_diffusers(model.model_config.unet_config)
    ours = {name: (target.key, target.rows and (0, *target.rows), target.exchanged)
            for name, target in targets.items()}
    theirs = {name: (at, None, False) if isinstance(at, str) else (at[0], at[1], len(at) > 2)
              for name, at in theirs.items()}
    assert ours == {name: at for name, at in theirs.items() if at[0] in shapes}
    assert {target.key for target in targets.values()} == shapes.keys()
    value = torch.arange(6.0)
    swapped = next(target for target in targets.values() if target.exchanged)
    assert torch.equal(swapped.spread(value, 6), comfy.utils.swap_scale_shift(value))


def test_training_lowers_the_loss_and_reaches_every_tensor(sd3, train):
    before = {key: value.clone() for key, value in sd3.model.state_dict().items()}
    untrained = train(sd3, learning_rate=0.0, unet_learning_rate=0.0)[1]["loss"]
    controlnext, loss_map, steps, controlled = train(sd3)
    assert steps == 8
    assert sum(loss_map["loss"][4:]) < 0.9 * sum(untrained[4:])  # of the same noise and timesteps
    assert all(torch.equal(value, before[key]) for key, value in sd3.model.state_dict().items())
    targets = targets_of({key: value.shape for key, value in sd3.model.diffusion_model.state_dict().items()})
    expected = {name for name in targets if ".to_out." in name}
    assert controlnext.unet_differences.keys() == expected
    attentions = 3 + len(sd3.model.model_config.unet_config["x_block_self_attn_layers"])
    assert len(expected) == 2 * attentions
    trained = {**controlnext.loaded.checkpoint.state_dict, **controlnext.unet_differences}
    assert [name for name, value in trained.items() if not value.any()] == []
    assert controlled.patches.keys() == {f"diffusion_model.{targets[name].key}" for name in expected}


def test_what_was_trained_draws_the_same_from_its_files_and_as_a_stock_lora(sd3, run, train, apply, comfy_nodes,
                                                                           models_folder):
    pattern = r"attn\.to_(q|v|out)|norm_out"  # with parts of a tensor, and one whose halves are exchanged
    trained, _, _, with_weights = train(sd3, steps=2, unet_pattern=pattern, gradient_checkpointing=False)
    comfy_nodes["ControlNeXtSave"].execute(trained, "controlnext/small_sd3")
    saved = max((OUTPUT / "controlnext").glob("small_sd3_*_"))
    for file in ("controlnet", "unet"):
        (saved / f"{file}.safetensors").rename(models_folder / "controlnext" / f"sd3_{file}.safetensors")
    loaded = run("ControlNeXtLoader", controlnext_name="sd3_controlnet.safetensors", variant="auto")
    assert loaded.variant == "sd3" and loaded.place_name == "tokens"
    by_file = run("ControlNeXtUNetLoader", model=sd3, unet_name="sd3_unet.safetensors", strength=1.0, mode="auto")
    folder_paths.add_model_folder_path("loras", str(OUTPUT / "loras"))  # as ComfyUI's main.py does
    output = comfy_nodes["ControlNeXtSaveAsLoRA"].execute("sd3_unet.safetensors", sd3, "loras/sd3", 0)
    lora = Path(output.ui.as_dict()["text"][0].split(":")[0]).name
    by_lora = run("LoraLoaderModelOnly", model=sd3, lora_name=lora, strength_model=1.0)
    drawn, from_file, from_lora, plain = (
        sample(apply(model, controlnext, picture()), *conds(sd3, "sd3"), latent("sd3"), cfg=2.0, steps=1)
        for model, controlnext in ((with_weights, trained), (by_file, loaded), (by_lora, loaded), (sd3, loaded)))
    assert torch.equal(from_file, drawn)
    assert torch.equal(from_lora, drawn)
    assert not torch.equal(plain, drawn)


def test_a_diffusers_file_replaces_the_weights_and_a_part_of_it_cannot(sd3, run, models_folder):
    other = small_sd3(seed=5, **{key: sd3.model.model_config.unet_config[key]
                                 for key in SD35_MEDIUM if key in sd3.model.model_config.unet_config})
    # a table that is not learned, and that ComfyUI patches in no model
    other.model.diffusion_model.pos_embed.copy_(sd3.model.diffusion_model.pos_embed)
    weights = other.model.diffusion_model.state_dict()
    file = {}
    for name, target in targets_of({key: value.shape for key, value in weights.items()}).items():
        first, rows = target.rows or (0, None)
        value = weights[target.key][first:rows and first + rows]
        file[name] = target.ordered(value).contiguous()
    folder = models_folder / "controlnext"
    save_file({f"transformer.{name}": value for name, value in file.items()}, folder / "full.safetensors")
    replaced = run("ControlNeXtUNetLoader", model=sd3, unet_name="full.safetensors", strength=1.0, mode="replace")
    results = [sample(model, *conds(sd3, "sd3"), latent("sd3"), steps=1) for model in (replaced, other)]
    assert torch.allclose(*results, atol=1e-4)
    save_file({name: value for name, value in file.items() if "to_v" in name}, folder / "v.safetensors")
    with pytest.raises(ValueError, match="^mode: v.safetensors holds some of the query, key and value weights .*; set "
                                         r"mode to difference or choose a file with all three\.$"):
        run("ControlNeXtUNetLoader", model=sd3, unet_name="v.safetensors", strength=1.0, mode="replace")


def test_captions_of_different_lengths_cannot_be_in_one_batch(pack, sd3):
    captions = [cond(sd3, seed, context=torch.randn(1, tokens, 4096)) for seed, tokens in enumerate((77, 154))]
    samples = pack("nodes.training.data").Samples([{"samples": torch.zeros(2, 16, 8, 8)}], captions,
                                                  [picture(0, 2)], None, 8)
    with pytest.raises(ValueError, match="^conditioning: captions of one batch have different lengths"):
        samples.batch_conds(sd3.model, [0, 1], [False, False], "cpu")
    assert samples.batch_conds(sd3.model, [1], [False], "cpu")["c_crossattn"].shape[1] == 154
