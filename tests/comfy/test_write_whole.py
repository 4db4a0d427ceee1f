"""What the save nodes write is there whole or not at all, whenever the process ends and whatever the disk says."""

import os
from pathlib import Path

import folder_paths
import pytest
import torch
from faults import full_disk, kill_while_writing
from models import known_unet
from safetensors.torch import load_file, save_file

from controlnext_core.unet_keys import diffusers_to_ldm

MB = 1 << 20
SIZES = {"model": (1, 5 * MB, 20 * MB, 40 * MB), "lora": (1, 10 * MB, 30 * MB)}  # of what is written when it is killed


@pytest.fixture(scope="module")
def unet():
    return known_unet()


@pytest.fixture
def folder(tmp_path_factory, monkeypatch) -> Path:
    """A folder of ComfyUI's output folder that ComfyUI lists weight files of."""
    folder = tmp_path_factory.mktemp("written", numbered=True)
    folder = Path(folder_paths.get_output_directory()) / folder.name
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "written",
                        ([str(folder)], folder_paths.supported_pt_extensions))
    return folder


@pytest.fixture
def save_model(comfy_nodes, pack, goldens, folder):
    """save_model(): Save ControlNeXt Model of 14 MB and 32 MB of UNet weights."""
    weights = {"down_blocks.0.attentions.0.to_out.weight": torch.rand(8 * MB)}
    controlnext = pack("nodes.runtime.loaded").trained_controlnext(goldens.state_dict("sd15"), "sd15", "test", weights)
    return lambda: comfy_nodes["ControlNeXtSave"].execute(controlnext, f"{folder.name}/saved")


@pytest.fixture
def save_lora(comfy_nodes, unet, models_folder, folder):
    """save_lora(): Save ControlNeXt UNet Weights as LoRA of 40 MB and more."""
    weights = unet.model.diffusion_model.state_dict()
    file = {name: weights[key] for name, key in diffusers_to_ldm(weights).items() if "attentions" in name}
    save_file(file, models_folder / "controlnext" / "written.safetensors", {"controlnext.unet": "difference"})
    return lambda: comfy_nodes["ControlNeXtSaveAsLoRA"].execute("written.safetensors", unet, f"{folder.name}/saved", 0)


@pytest.fixture(params=["model", "lora"])
def saver(request):
    """(save(), the sizes to kill it at)"""
    return request.getfixturevalue(f"save_{request.param}"), SIZES[request.param]


def saved(folder: Path) -> dict[str, list[str]]:
    """{name: files in it, or itself} of all in the folder, but what was left unfinished."""
    return {path.name: [f"{path.name}/{name}" for name in sorted(os.listdir(path))] if path.is_dir() else [path.name]
            for path in folder.iterdir() if path.suffix != ".part"}


def listed(folder: Path) -> dict[str, dict]:
    """{name: content} of the weight files that ComfyUI lists."""
    return {name: load_file(folder / name) for name in folder_paths.get_filename_list("written")}


def test_of_a_save_that_was_killed_nothing_is_listed_and_the_next_one_is_whole(saver, folder):
    save, sizes = saver
    save()
    before, (whole,) = listed(folder), saved(folder).values()
    assert any([kill_while_writing(save, folder, size) for size in sizes])
    save()
    after, names = listed(folder), saved(folder).values()
    assert len(names) >= 2 and {len(files) for files in names} == {len(whole)}
    assert after.keys() == {file for files in names for file in files}
    for name, tensors in after.items():
        (content,) = (content for content in before.values() if content.keys() == tensors.keys())
        assert all(torch.equal(tensor, content[key]) for key, tensor in tensors.items()), name


def test_of_a_save_that_the_disk_refuses_nothing_is_left_but_one_sentence(saver, folder):
    save, sizes = saver
    save()
    before, content = saved(folder), listed(folder)
    for size in sizes[:-1]:
        with full_disk(size), pytest.raises(ValueError) as refused:
            save()
        sentence = str(refused.value)
        assert sentence.startswith("filename_prefix: ") and "File too large" in sentence
        assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 300
        assert [path.name for path in folder.iterdir()] == list(before)
    assert all(torch.equal(tensor, content[name][key])
               for name, tensors in listed(folder).items() for key, tensor in tensors.items())
