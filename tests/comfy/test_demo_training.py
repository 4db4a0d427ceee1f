"""Training the demonstration's controls (demo_model/control.py): the pack's own node, driven as make.py drives it."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from demo_model import control, provide
from demo_model.bases import BASES
from demo_model.drawings import Drawings, load_held_out


@pytest.mark.parametrize(("base", "place", "weights"), [("sd15", "conv_in", "conv1"), ("sd3", "tokens", "to_out")])
def test_a_control_is_trained_by_the_node_goes_on_where_it_was_and_is_saved_with_its_place(
        run, demonstrate, models_folder, tmp_path, monkeypatch, base, place, weights):
    pictures, captions = load_held_out(provide.WEIGHTS)
    drawings = Drawings(pictures[:2], captions[:2], held_out=np.array([], int))
    monkeypatch.setitem(control.SETTINGS, "save_every", 1)
    comfyui = models_folder.parent
    for steps in (1, 2):
        folder = control.train(run, comfyui, drawings, BASES[base], "canny", steps, tmp_path / "encoded.pt")
    kept = sorted(file.name for file in (comfyui / "output" / "controlnext_training").glob(f"{base}_canny_*.pt"))
    assert [name[-9:] for name in kept] == ["step_1.pt", "step_2.pt"]
    assert {file.name for file in folder.iterdir()} == {"controlnet.safetensors", "unet.safetensors"}
    with safe_open(folder / "controlnet.safetensors", "pt") as file:
        assert file.metadata()["controlnext.family"] == base
        assert file.metadata()["controlnext.place"] == place
        assert file.get_slice("embedding.0.weight").get_shape()[0] == control.WIDTHS["stem_0"]
    differences = load_file(folder / "unet.safetensors")
    assert any(weights in name for name in differences)
    assert all(value.any() for value in differences.values())
