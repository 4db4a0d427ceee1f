"""What nodes show on themselves after a run: what was loaded, and when control acts."""

import comfy_client
import demo
import pytest
import stand_in
from PIL import Image


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


def strengths(shown: dict) -> list[float]:
    """What Apply ControlNeXt's chart shows at 20, 50 and 80 % of the sampling."""
    (chart,) = shown["apply"].values()  # and nothing else, no picture above all
    return [chart[len(chart) * percent // 100] for percent in (20, 50, 80)]


@pytest.mark.parametrize("variant, text", [
    ("svd_padded", "svd_padded for SVD, 3.53 million parameters, float16"),
    ("auto", "3.53 million parameters, float16; the connected MODEL tells which family it is"),
])
def test_the_loader_says_what_it_loaded(url, variant, text):
    shown = comfy_client.run_graph(url, {
        "load": {"class_type": "ControlNeXtLoader",
                 "inputs": {"controlnext_name": stand_in.CONTROLNEXT, "variant": variant}},
        "end": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}},
    })
    assert shown["load"]["text"] == [text]


def test_the_chart_shows_when_control_acts(shown):
    assert strengths(shown(start_percent=0.4, end_percent=0.6)) == [0, 1, 0]


def test_the_chart_shows_how_strongly_control_acts(shown):
    assert strengths(shown(strength=0.5)) == [0.5] * 3


def test_the_chart_of_strength_0_is_empty(shown):
    assert strengths(shown(strength=0.0)) == [0] * 3


def test_the_chart_follows_a_curve(shown, url):
    if "CurveEditor" not in comfy_client.get_json(f"{url}/object_info"):
        pytest.skip("this ComfyUI has no Curve Editor")
    ramp = {"points": [[0.0, 1.0], [1.0, 0.0]], "interpolation": "linear"}
    assert strengths(shown(strength_curve=ramp)) == pytest.approx([0.8, 0.5, 0.2], abs=0.02)
