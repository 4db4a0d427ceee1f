"""Load ControlNeXt UNet Weights: the weights that ComfyUI computes from its patches."""

import gc
import logging
import os
import sys

import folder_paths
import pytest
import torch
from models import WIDTH, small_unet
from safetensors.torch import save_file
from sampling import cond, sample

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module
from controlnext_core.unet_keys import diffusers_to_ldm

ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight"
PREFIX = "diffusion_model."


@pytest.fixture(scope="module")
def unet():
    yield small_unet("sd15")
    gc.collect()


def original(model) -> dict:
    """{LDM key: weight} as the model was built."""
    return model.model.diffusion_model.state_dict()


def patched(model, key: str) -> torch.Tensor:
    """A weight as ComfyUI computes it from the model's patches."""
    return model.patch_weight_to_device(PREFIX + key, torch.device("cpu"), return_weight=True)


def differences(model, factor: float = 0.05, seed: int = 1, keys=("attn2.to_out", "norm2", "op.")) -> dict:
    """{LDM key: small random tensor} for all weights of the model with one of ``keys`` in their name."""
    generator = torch.Generator().manual_seed(seed)
    return {key: factor * torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
            for key, value in original(model).items() if any(part in key for part in keys)}


def full(model, seed: int = 2, **choice) -> dict:
    """{LDM key: fine-tuned weight} for the same keys."""
    return {key: original(model)[key] + value for key, value in differences(model, 0.2, seed, **choice).items()}


def save_lora(model, name: str, seed: int) -> None:
    """A rank 4 LoRA on all cross attention outputs, in models/loras."""
    folder = folder_paths.get_folder_paths("loras")[0]
    os.makedirs(folder, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for key, value in original(model).items():
        if key.endswith("attn2.to_out.0.weight"):
            module = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            lora[f"{module}.lora_up.weight"] = 0.05 * torch.randn(len(value), 4, generator=generator)
            lora[f"{module}.lora_down.weight"] = 0.05 * torch.randn(4, value.shape[1], generator=generator)
            lora[f"{module}.alpha"] = torch.tensor(2.0)
    save_file(lora, os.path.join(folder, name))


@pytest.fixture
def load(run, models_folder):
    """load(model, tensors, ...): the tensors written to a file, and the file loaded by the node."""
    def load_unet(model, tensors: dict, strength: float = 1.0, mode: str = "auto", name: str = "unet.safetensors"):
        path = models_folder / "controlnext" / name
        if name.endswith(".safetensors"):
            save_file(tensors, path)
        else:
            torch.save(tensors, path)
        return run("ControlNeXtUNetLoader", model=model, unet_name=name, strength=strength, mode=mode)
    return load_unet


@pytest.fixture
def lora(run, unet):
    """lora(model, seed, strength): the model with a LoRA on top, by the stock node."""
    def load_lora(model, seed: int = 3, strength: float = 1.0):
        save_lora(unet, f"lora{seed}.safetensors", seed)
        return run("LoraLoaderModelOnly", model=model, lora_name=f"lora{seed}.safetensors", strength_model=strength)
    return load_lora


def assert_equal_weights(model, expected, keys, tolerance: float = 1e-6):
    """Every weight within ``tolerance`` of the largest one of the expected tensor."""
    for key in keys:
        right = expected[key] if isinstance(expected, dict) else patched(expected, key)
        assert float((patched(model, key) - right).abs().max()) <= tolerance * float(right.abs().max()), key


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 2.0])
def test_differences_are_added_with_strength(unet, load, strength):
    file = differences(unet)
    model = load(unet, file, strength, "difference")
    assert_equal_weights(model, {key: original(unet)[key] + strength * value for key, value in file.items()}, file)


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 2.0])
def test_replacing_is_the_linear_interpolation_between_the_weights_and_the_file(unet, load, strength):
    file = full(unet)
    model = load(unet, file, strength, "replace")
    expected = {key: torch.lerp(original(unet)[key], value, strength) for key, value in file.items()}
    assert_equal_weights(model, expected, file)
    if strength == 1.0:
        assert all(torch.equal(patched(model, key), value) for key, value in file.items())


@pytest.mark.parametrize("name", ["unet.safetensors", "unet.bin", "unet.pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_any_kind_and_precision_with_diffusers_names(unet, load, name, dtype):
    names = {key: diffusers for diffusers, key in diffusers_to_ldm(original(unet)).items()}
    file = {key: value.to(dtype) for key, value in differences(unet).items()}
    model = load(unet, {names[key]: value for key, value in file.items()}, name=name)
    assert_equal_weights(model, {key: original(unet)[key] + value.float() for key, value in file.items()}, file)


@pytest.mark.parametrize("base", ["sdxl", "svd"])
def test_every_tensor_of_the_other_unets_is_replaced(load, base, caplog):
    unet, other = small_unet(base), small_unet(base, seed=1)
    names = diffusers_to_ldm(original(unet))
    file = {name: original(other)[key] for name, key in names.items()}
    with caplog.at_level(logging.INFO):
        model = load(unet, file, mode="replace")
    assert f"{len(original(unet))} tensors put in place" in caplog.text
    assert all(torch.equal(patched(model, key), original(other)[key]) for key in original(unet))


@pytest.mark.parametrize("mode, file", [("difference", differences), ("replace", full)])
def test_auto_tells_what_it_decided_and_why(unet, load, caplog, mode, file):
    tensors = file(unet)
    with caplog.at_level(logging.INFO):
        auto = load(unet, tensors)
    chosen = load(unet, tensors, mode=mode)
    assert all(torch.equal(patched(auto, key), patched(chosen, key)) for key in tensors)
    said = "added as differences" if mode == "difference" else "put in place of the MODEL's"
    assert f"unet.safetensors: {len(tensors)} tensors {said} at strength 1 (auto: they " in caplog.text
    assert "cosine" in caplog.text


def test_what_auto_decided_is_on_the_node_too(unet, comfy_nodes, load):
    load(unet, differences(unet))
    output = comfy_nodes["ControlNeXtUNetLoader"].execute(unet, "unet.safetensors", 1.0, "auto")
    assert "added as differences" in output.ui.as_dict()["text"][0]


def test_the_mode_can_be_overridden(unet, load):
    file = differences(unet)
    model = load(unet, file, mode="replace")
    assert torch.equal(patched(model, ATTENTION), file[ATTENTION])


@pytest.mark.parametrize("file, mode", [(differences, "difference"), (full, "replace")])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_loras_before_and_after_give_the_same_weights(unet, load, lora, file, mode, strength):
    tensors = file(unet)
    after = lora(lora(load(unet, tensors, strength), 3, 0.8), 4, -0.5)
    before = load(lora(lora(unet, 3, 0.8), 4, -0.5), tensors, strength)
    between = lora(load(lora(unet, 3, 0.8), tensors, strength), 4, -0.5)
    only_loras = lora(lora(unet, 3, 0.8), 4, -0.5)
    for key, value in tensors.items():
        base = original(unet)[key]
        added = strength * (value if mode == "difference" else value - base)
        expected = {key: (patched(only_loras, key) + added)}
        for model in (after, before, between):
            assert_equal_weights(model, expected, [key])
        assert_equal_weights(before, after, [key], tolerance=0.0)


def test_a_lora_that_depends_on_the_weight_acts_on_the_fine_tuned_one_in_any_order(unet, run, load):
    name = ATTENTION.removesuffix(".weight")
    width = original(unet)[ATTENTION].shape[0]
    generator = torch.Generator().manual_seed(5)
    dora = {f"{PREFIX}{name}.lora_up.weight": torch.randn(width, 4, generator=generator),
            f"{PREFIX}{name}.lora_down.weight": 0.01 * torch.randn(4, width, generator=generator),
            f"{PREFIX}{name}.dora_scale": torch.rand(1, width, generator=generator) + 0.5}
    folder = folder_paths.get_folder_paths("loras")[0]
    os.makedirs(folder, exist_ok=True)
    save_file(dora, os.path.join(folder, "dora.safetensors"))

    def load_dora(model):
        return run("LoraLoaderModelOnly", model=model, lora_name="dora.safetensors", strength_model=1.0)
    file = differences(unet)
    before, after = load(load_dora(unet), file), load_dora(load(unet, file))
    assert_equal_weights(before, after, [ATTENTION], tolerance=0.0)
    assert not torch.allclose(patched(after, ATTENTION), patched(load_dora(unet), ATTENTION) + file[ATTENTION])


def test_two_difference_files_add(unet, load):
    first, second = differences(unet, seed=1), differences(unet, seed=2)
    model = load(load(unet, first, 0.5), second, 2.0, name="second.safetensors")
    expected = {key: original(unet)[key] + 0.5 * first[key] + 2.0 * second[key] for key in first}
    assert_equal_weights(model, expected, first)


def test_a_difference_adds_to_a_replacement_in_any_order(unet, load):
    replacement, difference = full(unet), differences(unet)
    expected = {key: torch.lerp(original(unet)[key], replacement[key], 0.5) + difference[key] for key in difference}
    first = load(load(unet, replacement, 0.5), difference, name="second.safetensors")
    last = load(load(unet, difference, name="second.safetensors"), replacement, 0.5)
    assert_equal_weights(first, expected, difference)
    assert_equal_weights(last, expected, difference)


def test_of_two_replacements_the_later_interpolates_from_the_earlier(unet, load, lora):
    first, second = full(unet, seed=1), full(unet, seed=2)
    halfway = load(load(unet, first, 0.5), second, 0.25, name="second.safetensors")
    expected = {key: torch.lerp(torch.lerp(original(unet)[key], first[key], 0.5), second[key], 0.25) for key in first}
    assert_equal_weights(halfway, expected, first)
    fully = load(lora(load(unet, first)), second, name="second.safetensors")
    assert_equal_weights(fully, lora(load(unet, second)), first)


def test_a_merged_model_is_replaced_as_a_whole_and_keeps_its_loras(unet, load, lora, run):
    other, file = small_unet("sd15", seed=9), full(unet)
    merged = run("ModelMergeSimple", model1=lora(unet), model2=other, ratio=0.25)
    model = load(merged, file, mode="replace")
    for key, value in file.items():
        lora_part = patched(lora(unet), key) - original(unet)[key]
        assert_equal_weights(model, {key: value + 0.25 * lora_part}, [key])


def test_keys_that_the_model_lacks_are_counted_and_named(unet, load, caplog):
    file = differences(unet) | {f"down_blocks.7.resnets.{index}.norm1.bias": torch.zeros(1) for index in range(7)}
    with caplog.at_level(logging.INFO):
        load(unet, file)
    assert "7 tensors that this MODEL lacks were left out: down_blocks.7.resnets.0.norm1.bias, down" in caplog.text


@pytest.mark.parametrize("write, message", [
    (lambda path: path.write_bytes(b""), "unet_name: bad.safetensors is empty"),
    (lambda path: path.write_bytes(b"\x20" + b"\0" * 7 + b"{broken" + b" " * 40),
     "unet_name: bad.safetensors cannot be read"),
    (lambda path: save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, path),
     "unet_name: bad.safetensors holds no UNet weights for the connected MODEL: it is a LoRA"),
    (lambda path: save_file({ATTENTION: torch.zeros(3, 3)}, path),
     rf"unet_name: bad.safetensors: tensor {ATTENTION} has shape \[3, 3\] where the connected MODEL has \[64, 64\]"),
])
def test_bad_files_are_one_sentence_that_names_the_input(unet, run, models_folder, write, message):
    write(models_folder / "controlnext" / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        run("ControlNeXtUNetLoader", model=unet, unet_name="bad.safetensors", strength=1.0, mode="auto")


def test_a_file_with_unet_and_control_gives_each_loader_its_part(unet, run, load, models_folder, caplog):
    """As DeepSpeed saves a training of the authors' code."""
    file = differences(unet)
    control = new_module(FAMILIES["sd15"], out=WIDTH).state_dict()
    both = {f"unet.{key}": value for key, value in file.items()} | {
        f"controlnext.{key}": value for key, value in control.items()}
    with caplog.at_level(logging.INFO):
        model = load(unet, both, name="pytorch_model.bin")
    assert "left out" not in caplog.text
    assert_equal_weights(model, {key: original(unet)[key] + value for key, value in file.items()}, file)
    loaded = run("ControlNeXtLoader", controlnext_name="pytorch_model.bin", variant="auto").patcher.model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in control.items())


@pytest.mark.parametrize("base", ["sd15", "sdxl", "svd"])
@pytest.mark.parametrize("kept", [1, 3])
def test_differences_that_lack_tensors_are_added_where_they_are(load, base, kept):
    """The authors' tool leaves out what training has hardly changed."""
    unet = small_unet(base)
    names = {key: name for name, key in diffusers_to_ldm(original(unet)).items()}
    file = {key: value.half() for key, value in list(differences(unet, keys=("to_out", "to_v")).items())[:kept]}
    model = load(unet, {names[key]: value for key, value in file.items()}, name="increments.bin")
    assert len(model.patches) == kept
    assert_equal_weights(model, {key: original(unet)[key] + value for key, value in file.items()}, file)


def test_weights_for_sdxl_on_sd15_are_an_error_that_names_both(unet, load):
    sdxl = small_unet("sdxl")
    file = {name: original(sdxl)[key] for name, key in diffusers_to_ldm(original(sdxl)).items()}
    with pytest.raises(ValueError, match="holds UNet weights for SDXL, but the connected MODEL is SD1.5"):
        load(unet, file)


def test_strength_0_changes_nothing(unet, load):
    assert load(unet, differences(unet), 0.0) is unet


def test_the_incoming_model_stays_as_it_is(unet, load, lora):
    model = lora(unet)
    before = {key: list(patches) for key, patches in model.patches.items()}
    load(model, full(unet))
    assert model.patches == before
    assert unet.patches == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of a process's own memory")
def test_no_memory_but_the_mapped_file_is_needed(unet, load, models_folder):
    def anonymous() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    load(unet, original(unet))
    size = (models_folder / "controlnext" / "unet.safetensors").stat().st_size
    gc.collect()
    before = anonymous()
    model = load(unet, original(unet), mode="auto")
    assert anonymous() - before < 0.1 * size
    assert len(model.patches) == len(original(unet))


@pytest.mark.parametrize("file, bound", [(differences, 0.1), (full, 0.1)])
def test_fp8_models_take_the_weights(load, file, bound):
    unet = small_unet("sd15")
    tensors = file(unet)
    expected = {key: patched(load(unet, tensors), key) for key in tensors}
    unet.model.diffusion_model.to(torch.float8_e4m3fn)
    model = load(unet, tensors)
    for key, right in expected.items():
        weight = patched(model, key)
        assert weight.dtype == torch.float8_e4m3fn
        assert float((weight.float() - right).norm() / right.norm()) < bound, key


@pytest.mark.parametrize("file", [differences, full])
def test_offloaded_weights_are_patched_on_the_fly_alike(unet, load, lora, file):
    model = load(lora(unet), file(unet))
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def output(**options) -> torch.Tensor:
        loaded = model.clone()
        loaded.load(torch.device("cpu"), **options)
        assert (loaded.lowvram_patch_counter() > 0) is ("lowvram_model_memory" in options)
        with torch.no_grad():
            result = loaded.model.diffusion_model(latent, torch.tensor([500.0]), cond(model)[0][0])
        loaded.detach()
        return result
    whole, streamed = output(full_load=True), output(lowvram_model_memory=1)
    assert float((streamed - whole).abs().max()) <= 1e-5 * float(whole.std())


def test_the_model_samples_as_one_with_the_weights_baked_in(unet, load, lora):
    file = full(unet)
    model = lora(load(unet, file))
    baked = small_unet("sd15")
    baked.model.diffusion_model.load_state_dict(
        original(unet) | {key.removeprefix(PREFIX): patched(model, key.removeprefix(PREFIX)) for key in model.patches})
    latent = torch.zeros(1, 4, 16, 16)
    one, other = (sample(m, cond(m), cond(m, 1), latent, cfg=3.0) for m in (model, baked))
    assert float((one - other).abs().max()) <= 1e-5 * float(other.std())
