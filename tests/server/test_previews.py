"""What nodes show on themselves after a run: what was loaded, and when control acts."""

import comfy_client
import demo
import numpy as np
import pytest
import stand_in
from PIL import Image

TOP, MIDDLE, BOTTOM = 20, 70, 130  # rows of the chart: near strength 1, half way, near 0


@pytest.fixture(scope="module")
def shown(url, base):
    """shown(changes of Apply ControlNeXt): what the nodes of the main job show, without its sampling."""
    Image.new("RGB", (128, 96), "gray").save(base / "input" / "previews.png")

    def run(**changes) -> dict:
        graph = demo.main_job(stand_in.CHECKPOINT, stand_in.CONTROLNEXT, "previews.png", size=(128, 96), steps=1)
        graph["apply"]["inputs"] |= changes
        keep = ("checkpoint", "controlnext", "photo", "edges", "apply")
        graph = {name: graph[name] for name in keep}
        graph["end"] = {"class_type": "PreviewAny", "inputs": {"source": ["apply", 0]}}
        return comfy_client.run_graph(url, graph)
    return run


@pytest.fixture(scope="module")
def chart(shown, base):
    def draw(**changes) -> np.ndarray:
        return np.array(Image.open(demo.image_path(base, shown(**changes)["apply"])))
    return draw


def filled(chart: np.ndarray, row: int) -> list[bool]:
    """Whether the area below the line reaches a row, at 20, 50 and 80 % of the sampling."""
    return [bool(chart[row, 40 + int(share * 332)].max() > 90) for share in (0.2, 0.5, 0.8)]


def test_the_loader_says_what_it_loaded(url):
    shown = comfy_client.run_graph(url, {
        "load": {"class_type": "ControlNeXtLoader",
                 "inputs": {"controlnext_name": stand_in.CONTROLNEXT, "variant": "svd_padded"}},
        "end": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}},
    })
    assert shown["load"]["text"] == ["svd_padded for SVD, 3.53 million parameters, float16"]


def test_the_chart_shows_when_control_acts(chart):
    assert filled(chart(start_percent=0.4, end_percent=0.6), TOP) == [False, True, False]


def test_the_chart_shows_how_strongly_control_acts(chart):
    half = chart(strength=0.5)
    assert filled(half, TOP) == [False] * 3
    assert filled(half, MIDDLE + 10) == [True] * 3


def test_the_chart_of_strength_0_is_empty(chart):
    assert filled(chart(strength=0.0), BOTTOM) == [False] * 3


def test_the_chart_follows_a_curve(chart, url):
    if "CurveEditor" not in comfy_client.get_json(f"{url}/object_info"):
        pytest.skip("this ComfyUI has no Curve Editor")
    ramp = {"points": [[0.0, 1.0], [1.0, 0.0]], "interpolation": "linear"}
    falling = chart(strength_curve=ramp)
    assert filled(falling, MIDDLE) == [True, False, False]
    assert filled(falling, BOTTOM) == [True, True, True]
