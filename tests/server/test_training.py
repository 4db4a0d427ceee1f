"""A training through the real server: the stock dataset nodes, an interruption, and going on from what it kept."""

import json
import urllib.request

import comfy_client
import pytest
from training_graph import graph


def test_an_interrupted_training_is_listed_and_goes_on_to_a_saved_model(url, base, pictures):
    def interrupt_after_a_step(kind: str, data: dict) -> None:
        if kind == "progress" and data.get("node") == "train" and data["value"] == 1:
            comfy_client.open_url(urllib.request.Request(f"{url}/interrupt", b"{}", method="POST"))

    with pytest.raises(comfy_client.ComfyError, match="interrupted"):
        comfy_client.run_graph(url, graph(steps=1000), interrupt_after_a_step)
    (kept,) = (base / "output" / "controlnext_training").glob("server_*.pt")
    listed = comfy_client.get_json(f"{url}/object_info/ControlNeXtTrain")["ControlNeXtTrain"]["input"]["optional"]
    assert kept.name in json.dumps(listed["resume_from"])
    at = int(kept.stem.rsplit("_", 1)[1])
    shown = comfy_client.run_graph(url, graph(steps=at + 2, resume_from=kept.name))
    assert shown["graph"]["images"]
    assert shown["save"]["text"][0].endswith("server_00001_: controlnet.safetensors (52 tensors)")
    assert (base / "output" / "controlnext" / "server_00001_" / "controlnet.safetensors").is_file()
