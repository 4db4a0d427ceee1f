"""Trainings through the real server: an interruption and going on from what it kept, and the example workflows."""

import json
import urllib.request
from types import SimpleNamespace

import comfy_client
import demo
import numpy as np
import pytest
import stand_in
import thumbnails
from graph import to_prompt
from pictures import put_training
from PIL import Image
from training_graph import graph

from demo_model import provide
from demo_model.drawings import load_held_out


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
    folder, files = shown["save"]["text"][0].split(": ")
    assert files == "controlnet.safetensors (53 tensors)"
    assert (base / "output" / folder / "controlnet.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(thumbnails.TRAINED))
def test_a_training_workflow_trains_saves_and_draws_with_and_without_control(url, base, comfyui, name):
    """From the file to the pictures, on the demonstration's model and a few of its drawings."""
    provide.provide(comfyui, base / "models")
    drawings, captions = load_held_out(provide.WEIGHTS)
    put_training(drawings[:4], captions[:4], base / "input" / thumbnails.TRAINING)
    drawing = thumbnails.put_drawing("rooster", False, base / "input")
    workflow = json.loads((thumbnails.EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    prompt = thumbnails.on_small_model(to_prompt(workflow, comfy_client.inputs_of(url)),
                                       SimpleNamespace(seed=0, training_steps=2), [drawing], ["rooster"])
    small = {"KSampler": {"steps": 2}, "ControlNeXtTrain": {"batch_size": 2}}
    for node in prompt.values():
        node["inputs"] |= small.get(node["class_type"], {})
    shown = {prompt[node]["class_type"]: output for node, output in comfy_client.run_graph(url, prompt).items()}
    assert shown["LossGraphNode"]["images"]
    text = shown["ControlNeXtSave"]["text"][0]
    assert "controlnet.safetensors (53 tensors) and unet.safetensors" in text
    assert (base / "output" / text.split(":")[0] / "unet.safetensors").is_file()
    controlled, free = (np.array(Image.open(demo.image_path(base, {"images": shown["ImageCompare"][key]})))
                        for key in ("a_images", "b_images"))
    assert (controlled != free).mean() > 0.01
    both = np.array(Image.open(demo.image_path(base, shown["SaveImage"])))
    assert (both == np.concatenate([controlled, free], axis=1)).all()


def test_the_distilling_workflow_learns_from_the_base_s_own_pictures_saves_and_draws(url, base):
    """From the file to the pictures, as small as can be; a ControlNeXt stands for the ControlNet."""
    Image.radial_gradient("L").convert("RGB").save(base / "input" / "distil.png")
    workflow = json.loads((thumbnails.EXAMPLES / "Distil a ControlNet.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, comfy_client.inputs_of(url))
    small = {"ckpt_name": stand_in.CHECKPOINT, "image": "distil.png", "steps": 2, "width": 64, "height": 64,
             "batch_size": 1, "training_dtype": "fp32", "grad_accumulation_steps": 1, "preview_every": 0}
    for node in list(prompt.values()):
        inputs = node["inputs"]
        inputs |= {name: value for name, value in small.items() if not isinstance(inputs.get(name, []), list)}
        if node["class_type"] == "ControlNetLoader":
            prompt["teacher"] = {"class_type": "ControlNeXtLoader",
                                 "inputs": {"controlnext_name": stand_in.CONTROLNEXT, "variant": "auto"}}
            node |= {"class_type": "ControlNeXtToControlNet", "inputs": {"controlnext": ["teacher", 0]}}
    shown = {prompt[node]["class_type"]: output for node, output in comfy_client.run_graph(url, prompt).items()}
    assert "controlnet.safetensors (53 tensors) and unet.safetensors" in shown["ControlNeXtSave"]["text"][0]
    assert shown["ImageCompare"]["a_images"] and shown["ImageCompare"]["b_images"] and shown["SaveImage"]["images"]
