"""ControlNeXt files are found where people keep them."""

import os
import sys

import folder_paths
import pytest
import torch
from models import WIDTH, narrowed, small_unet
from safetensors.torch import save_file

from controlnext_core.release_files import FAMILY_KEY, MODE_KEY, PLACE_KEY


@pytest.fixture
def listed(comfy_nodes):
    def names() -> list[str]:
        return comfy_nodes["ControlNeXtLoader"].INPUT_TYPES()["required"]["controlnext_name"][1]["options"]
    return names


@pytest.mark.versions
@pytest.mark.parametrize("folder", ["controlnext", "controlnet"])
def test_weights_in_both_folders_are_listed_and_other_files_are_not(listed, models_folder, folder):
    for name in ("here.safetensors", "here.bin", "here.pt", "notes.txt"):
        (models_folder / folder / f"{folder}-{name}").touch()
    found = [name for name in listed() if name.startswith(f"{folder}-")]
    assert found == [f"{folder}-here.bin", f"{folder}-here.pt", f"{folder}-here.safetensors"]


def test_a_folder_from_extra_model_paths_is_kept(listed, pack, tmp_path, monkeypatch):
    """ComfyUI reads extra_model_paths.yaml before it loads the packs, and adds the folder as an unknown kind."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    del folder_paths.folder_names_and_paths["controlnext"]
    folder_paths.add_model_folder_path("controlnext", str(tmp_path))
    (tmp_path / "elsewhere.safetensors").touch()
    (tmp_path / "readme.md").touch()
    pack().register_model_folder()
    assert folder_paths.get_full_path("controlnext", "elsewhere.safetensors") == str(tmp_path / "elsewhere.safetensors")
    assert "elsewhere.safetensors" in listed()
    assert "readme.md" not in listed()
    assert any(path.endswith("controlnext") for path in folder_paths.get_folder_paths("controlnext"))


NODES = {"ControlNeXtLoader": "controlnext_name", "ControlNeXtUNetLoader": "unet_name",
         "ControlNeXtSaveAsLoRA": "unet_name"}


@pytest.mark.skipif(sys.platform == "win32", reason="makes links and pipes, which Windows lets few users make")
@pytest.mark.parametrize("node, name", NODES.items())
def test_what_is_no_file_beside_the_files_counts_for_nothing(comfy_nodes, models_folder, node, name):
    """ComfyUI asks for the fingerprint of all files when the name comes over a link."""
    folder = models_folder / "controlnext"

    def fingerprint() -> str:
        return comfy_nodes[node].fingerprint_inputs(**{name: None})
    before = fingerprint()
    (folder / "folder.safetensors").mkdir()
    (folder / "broken.safetensors").symlink_to(folder / "gone.safetensors")
    (folder / "circle.bin").symlink_to(folder / "circle.bin")
    os.mkfifo(folder / "pipe.pt")
    try:
        assert fingerprint() == before
        (folder / "real.safetensors").write_bytes(b"one")
        assert fingerprint() != before
    finally:
        (folder / "folder.safetensors").rmdir()
        for path in ("broken.safetensors", "circle.bin", "pipe.pt", "real.safetensors"):
            (folder / path).unlink(missing_ok=True)


@pytest.mark.versions
@pytest.mark.parametrize("suffix", ["safetensors", "SafeTensors", "sft", "SFT"])
def test_metadata_is_read_whatever_the_file_s_ending(run, models_folder, goldens, suffix):
    folder = models_folder / "controlnext"
    save_file(narrowed(goldens.state_dict("svd")), folder / f"named.{suffix}",
              {FAMILY_KEY: "svd_padded", PLACE_KEY: "conv_in"})
    loaded = run("ControlNeXtLoader", controlnext_name=f"named.{suffix}", variant="auto")
    assert (loaded.variant, loaded.place_name) == ("svd_padded", "conv_in")


@pytest.mark.parametrize("suffix", ["safetensors", "sft"])
@pytest.mark.parametrize("mode", ["difference", "replace"])
def test_unet_weights_say_what_they_are_whatever_the_file_s_ending(run, models_folder, suffix, mode):
    unet = small_unet("sd15")
    value = torch.ones(WIDTH)
    save_file({"conv_in.bias": value}, models_folder / "controlnext" / f"mode.{suffix}", {MODE_KEY: mode})
    model = run("ControlNeXtUNetLoader", model=unet, unet_name=f"mode.{suffix}", strength=1.0, mode="auto")
    key = "diffusion_model.input_blocks.0.0.bias"
    weight = model.patch_weight_to_device(key, torch.device("cpu"), return_weight=True)
    base = unet.model.diffusion_model.input_blocks[0][0].bias
    torch.testing.assert_close(weight, base + value if mode == "difference" else value)
