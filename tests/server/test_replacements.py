"""Workflows made with the older ControlNeXt pack for SVD."""

import comfy_client
import pytest
import stand_in
from PIL import Image


@pytest.fixture
def old(base) -> dict:
    """A graph with that pack's node."""
    Image.new("RGB", (64, 64)).save(base / "input" / "pose.png")
    return {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": stand_in.CHECKPOINT}},
        "pose": {"class_type": "LoadImage", "inputs": {"image": "pose.png"}},
        "apply": {"class_type": "ControlNextSVDApply", "_meta": {"title": "ControlNext SVD Apply"},
                  "inputs": {"model": ["checkpoint", 0], "pose_images": ["pose", 0], "strength": 0.5, "blocks": "3",
                             "input_block_patch_after_skip": True}},
        "end": {"class_type": "PreviewAny", "inputs": {"source": ["apply", 0]}},
    }


def test_the_frontend_is_told_how_the_old_node_maps(url):
    (replacement,) = comfy_client.get_json(f"{url}/node_replacements")["ControlNextSVDApply"]
    assert replacement["new_node_id"] == "ControlNeXtApply"
    info = comfy_client.get_json(f"{url}/object_info/ControlNeXtApply")["ControlNeXtApply"]["input"]["required"]
    mapped = {mapping["new_id"] for mapping in replacement["input_mapping"]}
    assert mapped == info.keys() - {"controlnext"}


def test_of_the_old_node_just_the_model_file_is_left_to_connect(url, old):
    with pytest.raises(comfy_client.ComfyError, match="^ControlNeXtApply: Required input is missing: controlnext$"):
        comfy_client.run_graph(url, old)
