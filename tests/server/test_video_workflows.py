"""The example workflows for video, from the file to the saved video, on a small model of the SVD family.

Everything runs as it stands in the file but for the weight files, the sizes and pose estimation: its models take 1 GB,
so the poses come from a file.
"""

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import comfy_client
import environment
import pytest
import torch
from graph import to_prompt
from PIL import Image
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parent.parent
SIZE = 64
FILES = {"svd_xt.safetensors": "svd_small.ckpt", "driving_video.mp4": "driving.mp4", "example.png": "picture.png",
         "controlnext-svd_v2-unet-fp16.safetensors": "svd_small_unet.safetensors",
         "controlnext-svd_v2-controlnet-fp16.safetensors": "svd.safetensors"}
SMALLER = {"ImageScale": {"width": SIZE, "height": SIZE}, "KSampler": {"steps": 1},
           "ContextWindowsManual": {"context_length": 3, "context_overlap": 1}}
FRAMES = {"SVD Pose Video": 2, "SVD Long Pose Video": 4}  # of the driving video


@dataclass
class Result:
    """What a workflow has saved, frames (N, height, width, 3) and their number a second, and the server's log of it."""

    frames: torch.Tensor
    rate: float
    log: str


@pytest.fixture(scope="module")
def files(comfyui, base, goldens) -> None:
    """The files that the workflows choose, small."""
    subprocess.run([sys.executable, TESTS / "comfy" / "svd_files.py", comfyui, base / "models"], check=True)
    save_file(goldens.state_dict("svd"), base / "models" / "controlnext" / "svd.safetensors")
    Image.radial_gradient("L").convert("RGB").save(base / "input" / "picture.png")
    with av.open(base / "input" / "driving.mp4", "w") as video:
        stream = video.add_stream("h264", rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for index in range(6):
            picture = Image.new("RGB", (80, 64), (18 * index, 90, 120))
            video.mux(stream.encode(av.VideoFrame.from_image(picture)))
        video.mux(stream.encode(None))
    poses = json.loads((goldens.folder / "pose" / "align.json").read_text())
    (base / "reference.json").write_text(json.dumps(poses["reference"]))
    (base / "driving.json").write_text(json.dumps(poses["frames"]))


@pytest.fixture(scope="module")
def run(url, base, files):
    """run(name, without): the Result of a workflow; the strength of the node ``without`` is 0."""
    inputs_of = comfy_client.inputs_of(url)

    @functools.cache
    def run_workflow(name: str, without: str = "") -> Result:
        graph = to_prompt(json.loads((environment.REPOSITORY / "example_workflows" / f"{name}.json").read_text()),
                          inputs_of)
        smaller = {**SMALLER, "ImageFromBatch": {"length": FRAMES[name]}, without: {"strength": 0.0}}
        for node in graph.values():
            node["inputs"] = {key: FILES.get(value, value) if isinstance(value, str) else value
                              for key, value in node["inputs"].items()} | smaller.get(node["class_type"], {})
        align, = (node for node in graph.values() if node["class_type"] == "ControlNeXtAlignPose")
        for poses, file in (("keypoints", "driving.json"), ("reference", "reference.json")):
            estimator = graph[align["inputs"][poses][0]]
            assert estimator["class_type"] == "SDPoseKeypointExtractor"
            estimator.update(class_type="PosesFromFile",
                             inputs={"image": estimator["inputs"]["image"], "file": str(base / file)})
        log = (base / "server.log").read_text()
        outputs = comfy_client.run_graph(url, graph)
        saved = next(show["images"][0] for show in outputs.values() if True in show.get("animated", ()))
        with av.open(base / "output" / saved["subfolder"] / saved["filename"]) as video:
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in video.decode(video=0)]
            return Result(torch.stack(frames), float(video.streams.video[0].average_rate),
                          (base / "server.log").read_text().removeprefix(log))
    return run_workflow


@pytest.mark.parametrize("without", ["ControlNeXtApply", "ControlNeXtUNetLoader"])
def test_poses_and_unet_weights_both_change_the_video(run, without):
    whole, part = run("SVD Pose Video"), run("SVD Pose Video", without)
    assert (whole.frames != part.frames).float().mean() > 0.01


@pytest.mark.parametrize("name", FRAMES)
def test_the_workflow_saves_a_video_of_the_pictures_pose_and_all_poses_of_the_driving_video(run, name):
    result = run(name)
    assert result.frames.shape == (FRAMES[name] + 1, SIZE, SIZE, 3)
    assert result.rate == 12
    assert "control images for a batch of" not in result.log
    assert ("Using context windows" in result.log) is ("Long" in name)
