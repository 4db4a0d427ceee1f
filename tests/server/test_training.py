"""A training through the real server: the stock dataset nodes, an interruption, and going on from what it kept."""

import json
import urllib.request

import comfy_client
import numpy as np
import pytest
import stand_in
from PIL import Image


def graph(**settings) -> dict:
    inputs = dict(steps=3, batch_size=1, learning_rate=1e-3, unet_learning_rate=1e-4, trainable="module", seed=1,
                  training_dtype="fp32", gradient_checkpointing=True, save_every=0, preview_every=1,
                  filename_prefix="server")
    return {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": stand_in.CHECKPOINT}},
        "pictures": {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": "training"}},
        "dataset": {"class_type": "MakeTrainingDataset", "inputs": {
            "images": ["pictures", 0], "vae": ["checkpoint", 2], "clip": ["checkpoint", 1]}},
        "edges": {"class_type": "ControlNeXtCanny", "inputs": {
            "image": ["pictures", 0], "threshold": "auto", "low_threshold": 100, "high_threshold": 200}},
        "train": {"class_type": "ControlNeXtTrain", "inputs": {
            "model": ["checkpoint", 0], "latents": ["dataset", 0], "conditioning": ["dataset", 1],
            "images": ["edges", 0], **inputs, **settings}},
        "save": {"class_type": "ControlNeXtSave", "inputs": {
            "controlnext": ["train", 0], "filename_prefix": "controlnext/server"}},
        "graph": {"class_type": "LossGraphNode", "inputs": {"loss": ["train", 1], "filename_prefix": "loss"}},
    }


def test_an_interrupted_training_is_listed_and_goes_on_to_a_saved_model(url, base):
    folder = base / "input" / "training"
    folder.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")

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
