"""Save ControlNeXt UNet Weights as LoRA: the stock Load LoRA nodes give the same weights."""

import gc
import os
from pathlib import Path

import folder_paths
import pytest
import torch
from models import WIDTH, small_unet
from safetensors.torch import load_file
from test_unet_loader import assert_equal_weights, differences, full, original, patched

from controlnext_core.unet_keys import diffusers_to_ldm

KINDS = ("input_blocks.1.", "op.")  # with SVD's temporal layers


@pytest.fixture(scope="module", params=["sd15", "svd"])
def unet(request):
    yield small_unet(request.param)
    gc.collect()


@pytest.fixture
def save(comfy_nodes, models_folder):
    """save(model, tensors, rank, mode=...): path of the LoRA file that the node writes for them."""
    output_folder = Path(folder_paths.get_output_directory())
    folder_paths.add_model_folder_path("loras", str(output_folder / "loras"))  # as ComfyUI's main.py does

    def save_as_lora(model, tensors: dict, rank: int = 0, **mode):
        names = {key: name for name, key in diffusers_to_ldm(original(model)).items()}
        torch.save({names[key]: value for key, value in tensors.items()}, models_folder / "controlnext" / "unet.bin")
        output = comfy_nodes["ControlNeXtSaveAsLoRA"].execute("unet.bin", model, "loras/ControlNeXt", rank, **mode)
        return output_folder / output.ui.as_dict()["text"][0].split(":")[0]
    return save_as_lora


@pytest.mark.parametrize("file", [differences, full])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_full_lora_gives_the_weights_that_the_loader_gives(unet, run, save, file, strength):
    tensors = file(unet, keys=KINDS)
    assert {value.ndim for value in tensors.values()} >= {1, 2, 4}
    path = save(unet, tensors)
    stock = run("LoraLoaderModelOnly", model=unet, lora_name=path.name, strength_model=strength)
    ours = run("ControlNeXtUNetLoader", model=unet, unet_name="unet.bin", strength=strength, mode="auto")
    assert stock.patches.keys() == ours.patches.keys()
    assert_equal_weights(stock, ours, tensors)


@pytest.mark.parametrize("mode", ["difference", "replace"])
def test_the_mode_can_be_chosen_as_on_the_loader(unet, run, save, mode):
    tensors = full(unet) if mode == "difference" else differences(unet)  # of which auto would say the other
    path = save(unet, tensors, mode=mode)
    stock = run("LoraLoaderModelOnly", model=unet, lora_name=path.name, strength_model=1.0)
    ours = run("ControlNeXtUNetLoader", model=unet, unet_name="unet.bin", strength=1.0, mode=mode)
    assert_equal_weights(stock, ours, tensors)


def test_tensors_that_share_memory_are_saved(unet, save):
    keys = [key for key, value in original(unet).items() if value.shape == (WIDTH,)][:3]
    whole = torch.arange(WIDTH + 1.0)
    tensors = {keys[0]: whole[:WIDTH], keys[1]: whole[1:], keys[2]: whole[:WIDTH]}
    lora = load_file(save(unet, tensors))
    assert sorted(value[0].item() for value in lora.values()) == [0.0, 0.0, 1.0]


def test_the_stock_node_for_model_and_clip_takes_it_too(unet, run, save):
    tensors = differences(unet)
    path = save(unet, tensors)
    stock, _ = run("LoraLoader", model=unet, clip=None, lora_name=path.name, strength_model=1.0, strength_clip=1.0)
    assert_equal_weights(stock, {key: original(unet)[key] + value for key, value in tensors.items()}, tensors)


def test_loras_on_the_model_do_not_get_into_the_file(unet, run, save):
    tensors = full(unet)
    path = save(unet, tensors)
    with_lora = run("LoraLoaderModelOnly", model=unet, lora_name=path.name, strength_model=0.3)
    again = load_file(save(with_lora, tensors))
    assert all(torch.equal(value, again[key]) for key, value in load_file(path).items())


def test_differences_keep_their_precision_and_size(unet, save):
    tensors = {key: value.half() for key, value in differences(unet).items()}
    lora = load_file(save(unet, tensors))
    assert {value.dtype for value in lora.values()} == {torch.float16}
    assert sum(value.numel() for value in lora.values()) == sum(value.numel() for value in tensors.values())


def test_a_low_rank_gives_a_small_file_and_the_closest_weights(unet, run, save):
    tensors = differences(unet, keys=("input_blocks.1.",))
    rank = 8
    full_size = os.path.getsize(save(unet, tensors))
    path = save(unet, tensors, rank)
    assert os.path.getsize(path) < 0.2 * full_size
    stock = run("LoraLoaderModelOnly", model=unet, lora_name=path.name, strength_model=1.0)
    assert len(stock.patches) == len(tensors)
    for key, value in tensors.items():
        error = patched(stock, key) - original(unet)[key] - value
        if value.ndim > 1:
            singular = torch.linalg.svdvals(value.flatten(1))
            best, scale = float(singular[rank:].norm()), float(singular.norm())
            assert best <= float(error.norm()) + 1e-3 * scale
            assert float(error.norm()) <= best + 1e-3 * scale, key
        else:
            assert float(error.abs().max()) <= 1e-6
