"""A file that is exchanged between two runs is read anew, without a restart; one that is unchanged is not."""

import os
import shutil

import comfy_client
import demo
import pytest
import stand_in
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training_graph import graph as training

MODULE, UNET = "exchanged.safetensors", "exchanged_unet.safetensors"


def exchange(path, tensors: dict) -> None:
    """Put a file of the same size in the other's place."""
    save_file(tensors, path.with_suffix(".new"))
    assert not path.exists() or path.stat().st_size == path.with_suffix(".new").stat().st_size
    os.replace(path.with_suffix(".new"), path)


def unet_weights(seed: int) -> dict:
    noise = torch.randn(320, generator=torch.Generator().manual_seed(seed))
    return {"conv_in.bias": noise.half()}


def module_weights(seed: int) -> dict:
    return stand_in.random_weights(stand_in.controlnext_shapes(), seed)


MAKE = {MODULE: module_weights, UNET: unet_weights}


@pytest.fixture(scope="module")
def folder(base):
    """models/controlnext with both files."""
    folder = base / "models" / "controlnext"
    for name, make in MAKE.items():
        exchange(folder / name, make(0))
    return folder


@pytest.fixture(scope="module")
def run(url):
    """run(graph): (what the nodes show, which nodes ran)."""
    def run_graph(graph: dict) -> tuple[dict, set[str]]:
        kept = []
        shown = comfy_client.run_graph(url, graph, lambda kind, data: kept.extend(data["nodes"])
                                       if kind == "execution_cached" else None)
        return shown, graph.keys() - set(kept)
    return run_graph


def over_links(graph: dict) -> dict:
    """The graph with the names of the files from other nodes."""
    for node in [node for node in graph.values() if node["class_type"].startswith("ControlNeXt")]:
        for name in node["inputs"].keys() & {"controlnext_name", "unet_name"}:
            graph[f"{name} choice"] = {"class_type": "CustomCombo", "inputs": {"choice": node["inputs"][name]}}
            graph[name] = {"class_type": "ComfySwitchNode",
                           "inputs": {"switch": True, "on_true": [f"{name} choice", 0], "on_false": "none"}}
            node["inputs"][name] = [name, 0]
    return graph


@pytest.mark.parametrize("links", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_the_next_picture_is_made_with_the_file_that_took_the_other_s_place(run, base, folder, name, links):
    demo.put_photo(None, (64, 64), base / "input")
    graph = demo.main_job(stand_in.CHECKPOINT, MODULE, "controlnext_demo.png", size=(64, 64), steps=1,
                          unet_weights=UNET)
    if links:
        graph = over_links(graph)

    def picture() -> bytes:
        shown, ran = run(graph)
        assert "sample" in ran
        return Image.open(demo.image_path(base, shown["save"])).tobytes()
    exchange(folder / name, MAKE[name](1))
    first = picture()
    assert run(graph)[1] == set()
    exchange(folder / name, MAKE[name](2))
    assert picture() != first
    exchange(folder / name, MAKE[name](1))
    assert picture() == first


def test_a_lora_is_saved_anew_of_a_file_that_was_exchanged(run, base, folder):
    graph = {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": stand_in.CHECKPOINT}},
        "save": {"class_type": "ControlNeXtSaveAsLoRA", "inputs": {
            "unet_name": UNET, "model": ["checkpoint", 0], "filename_prefix": "exchanged/lora", "rank": 0}},
    }
    for seed in (3, 4):
        exchange(folder / UNET, unet_weights(seed))
        assert "save" in run(graph)[1]
        assert run(graph)[1] == set()
    loras = [load_file(file) for file in sorted((base / "output" / "exchanged").iterdir())]
    for lora, seed in zip(loras, (3, 4), strict=True):
        (saved,) = lora.values()
        assert saved.equal(unet_weights(seed)["conv_in.bias"])


def test_a_training_is_resumed_anew_from_a_file_that_was_exchanged(run, base, pictures):
    def train(**settings) -> dict:
        graph = training(filename_prefix="exchanged", preview_every=0, **settings)
        del graph["save"], graph["graph"]
        graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["train", 2]}}
        return graph
    run(train(steps=2, save_every=1))
    kept = base / "output" / "controlnext_training" / "exchanged_00001_step_1.pt"
    resumed = train(steps=1, resume_from=kept.name)
    shown, ran = run(resumed)
    assert "train" in ran and shown["show"]["text"] == ["1"]
    assert run(resumed)[1] == set()
    shutil.copy(kept.with_stem("exchanged_00001_step_2"), kept)
    shown, ran = run(resumed)
    assert "train" in ran and shown["show"]["text"] == ["2"]
