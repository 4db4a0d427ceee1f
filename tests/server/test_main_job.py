"""The main job over HTTP and websocket: photograph -> edges -> control -> sampled picture."""

import comfy_client
import demo
import numpy as np
import pytest
import stand_in
from apply_controlnet import through_apply_controlnet
from PIL import Image

SIZE = (128, 96)
STEPS = 3
PLACES = ["auto", "conv_in", "down_0", "down_1", "down_2", "before_middle", "middle", "tokens",
          *(f"block_{index}" for index in range(12))]


def main_job(controlnext: str = stand_in.CONTROLNEXT, **changes) -> dict:
    return demo.main_job(stand_in.CHECKPOINT, controlnext, "controlnext_demo.png", size=SIZE, steps=STEPS,
                         prompt="a portrait", **changes)


@pytest.fixture(scope="session")
def sample(url, base):
    """sample(graph, on_event): the saved picture's pixels, (height, width, 3) uint8."""
    demo.put_photo(None, SIZE, base / "input")

    def run(graph: dict, *on_event) -> np.ndarray:
        outputs = comfy_client.run_graph(url, graph, *on_event)
        return np.array(Image.open(demo.image_path(base, outputs["save"])))
    return run


@pytest.fixture(scope="session")
def controlled(sample) -> tuple[np.ndarray, list]:
    """The picture of the unchanged main job, and the messages that came while it was made."""
    messages = []
    return sample(main_job(), lambda kind, data: messages.append((kind, data))), messages


# {input: type, or for a choice its options or None where they are files}
CONTRACT = {
    "ControlNeXtLoader": (
        {"controlnext_name": None,
         "variant": ["auto", "sd15", "sd15_mid", "sdxl", "svd", "svd_padded", "svd_mid", "sd3", "flux", "chroma",
                     "qwen_image", "flux2", "z_image", "wan", "hunyuan_video15",
                     "ltxv", "krea2", "anima", "auraflow", "ltx2"]},
        {},
        ["CONTROLNEXT"],
    ),
    "ControlNeXtApply": (
        {"model": "MODEL", "controlnext": "CONTROLNEXT", "image": "IMAGE", "strength": "FLOAT",
         "start_percent": "FLOAT", "end_percent": "FLOAT"},
        {"mask": "MASK", "inject_at": PLACES, "apply_to": ["auto", "both", "positive"]},
        ["MODEL"],
    ),
    "ControlNeXtToControlNet": (
        {"controlnext": "CONTROLNEXT"},
        {"inject_at": PLACES, "apply_to": ["auto", "both", "positive"]},
        ["CONTROL_NET"],
    ),
    "ControlNeXtCanny": (
        {"image": "IMAGE", "threshold": ["auto", "manual"], "low_threshold": "INT", "high_threshold": "INT"},
        {},
        ["IMAGE"],
    ),
}


@pytest.mark.parametrize("node", CONTRACT)
def test_the_server_lists_the_node_with_the_inputs_that_workflow_files_hold(url, node):
    required, optional, outputs = CONTRACT[node]
    info = comfy_client.get_json(f"{url}/object_info/{node}")[node]
    assert info["output"] == outputs
    for kind, inputs in (("required", required), ("optional", optional)):
        # Inputs may be added as optional ones; these stay.
        assert set(inputs) <= set(info["input"].get(kind, {}))
        for name, expected in inputs.items():
            described = info["input"][kind][name]
            assert described[1]["tooltip"]
            if isinstance(expected, str):
                assert described[0] == expected
            elif expected:
                assert set(expected) == set(described[1]["options"])
    assert not set(info["input"]["required"]) - set(required)


def test_the_numbers_of_apply_have_the_documented_range_and_default(url):
    inputs = comfy_client.get_json(f"{url}/object_info/ControlNeXtApply")["ControlNeXtApply"]["input"]["required"]
    found = {name: [inputs[name][1][key] for key in ("default", "min", "max")]
             for name in ("strength", "start_percent", "end_percent")}
    assert found == {"strength": [1.0, 0.0, 10.0], "start_percent": [0.0, 0.0, 1.0], "end_percent": [1.0, 0.0, 1.0]}


def test_the_main_job_makes_a_picture_of_the_asked_size(controlled):
    picture, _ = controlled
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    assert picture.std() > 1


def test_every_node_and_the_sampling_steps_are_reported_while_the_graph_runs(controlled):
    _, messages = controlled
    begun = {data["node"] for kind, data in messages if kind == "executing"} - {None}
    kept = {node for kind, data in messages if kind == "execution_cached" for node in data["nodes"]}  # by tests before
    assert begun | kept == set(main_job())
    assert "sample" in begun
    steps = [(data["value"], data["max"]) for kind, data in messages if kind == "progress" and data["node"] == "sample"]
    # ComfyUI leaves steps between the first and the last out when they come too fast.
    assert (steps[0], steps[-1]) == ((1, STEPS), (STEPS, STEPS))


def test_control_changes_the_picture(controlled, sample):
    assert (controlled[0] != sample(main_job(strength=0.0))).mean() > 0.01


def test_apply_controlnet_makes_the_same_picture(controlled, sample):
    assert (sample(through_apply_controlnet(main_job())) == controlled[0]).all()


def test_a_control_net_that_does_not_fit_is_refused_in_one_sentence_by_the_sampler_and_the_next_prompt_runs(sample):
    words = r"^KSampler: inject_at: .* should enter at down_2, but the connected MODEL has no such place; .*\.$"
    with pytest.raises(comfy_client.ComfyError, match=words):
        sample(through_apply_controlnet(main_job(), "down_2"))
    assert sample(through_apply_controlnet(main_job())).shape == (SIZE[1], SIZE[0], 3)


def test_strength_0_makes_the_picture_of_a_graph_without_control(sample):
    without = main_job()
    del without["apply"]
    without["sample"]["inputs"]["model"] = ["checkpoint", 0]
    assert (sample(main_job(strength=0.0)) == sample(without)).all()


def test_a_full_controlnet_is_refused_in_one_sentence_and_the_next_prompt_runs(sample, full_controlnet):
    with pytest.raises(comfy_client.ComfyError) as refused:
        sample(main_job(controlnext=full_controlnet.name))
    node, input_name, sentence = str(refused.value).split(": ", 2)
    assert (node, input_name) == ("ControlNeXtLoader", "controlnext_name")
    assert full_controlnet.name in sentence and "Error" not in sentence and sentence.endswith(".")
    assert sample(main_job(seed=1)).shape == (SIZE[1], SIZE[0], 3)


def test_a_file_that_is_not_in_the_list_is_refused_before_the_run(url):
    with pytest.raises(comfy_client.ComfyError, match="ControlNeXtLoader: Value not in list: .*missing.safetensors"):
        comfy_client.run_graph(url, main_job(controlnext="missing.safetensors"))


@pytest.mark.parametrize("node", CONTRACT)
def test_the_help_page_is_served_where_the_frontend_asks_for_it(url, node):
    with comfy_client.open_url(f"{url}/extensions/ComfyUI-ControlNeXt/docs/{node}/en.md") as page:
        assert page.read().decode().startswith("# ")
