"""ControlNeXt files are found where people keep them."""

import folder_paths
import pytest


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
