"""scripts/train.py: a workflow trains without a server, in one process and, started by torchrun, in several."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import comfy_client
import numpy as np
import psutil
import pytest
import stand_in
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "train.py"
STEPS = 4
TIMEOUT = 2.0  # minutes; a machine with much to do may keep one rank waiting long for another


@pytest.fixture(scope="module")
def pictures(base) -> str:
    """A folder of pictures of two sizes."""
    folder = base / "input" / "for_ranks"
    folder.mkdir()
    for index, size in enumerate([(64, 64), (64, 128), (64, 64), (64, 128), (64, 64)]):
        noise = np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return folder.name


@pytest.fixture(scope="module")
def workflow(pictures, tmp_path_factory):
    """workflow(name, **settings): a workflow in API format whose files have this name."""
    def write(name: str, **settings) -> Path:
        inputs = dict(steps=STEPS, batch_size=2, learning_rate=1e-3, unet_learning_rate=1e-3, seed=1,
                      trainable="module and UNet weights", training_dtype="fp32", gradient_checkpointing=False,
                      save_every=0, preview_every=0, filename_prefix=name)
        graph = {
            "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": stand_in.CHECKPOINT}},
            "2": {"class_type": "ControlNeXtDataset", "inputs": {
                "folder": pictures, "vae": ["1", 2], "clip": ["1", 1], "size": 64, "buckets": True, "control": "canny",
                "mask_threshold": 0.5}},
            "3": {"class_type": "ControlNeXtTrain", "inputs": {"model": ["1", 0], "dataset": ["2", 0], **inputs,
                                                               **settings}},
            "4": {"class_type": "ControlNeXtSave", "inputs": {"controlnext": ["3", 0],
                                                              "filename_prefix": f"controlnext/{name}"}},
        }
        path = tmp_path_factory.mktemp("workflows") / f"{name}.json"
        path.write_text(json.dumps(graph))
        return path
    return write


@pytest.fixture(scope="module")
def start(base, comfyui):
    """start(workflow, ranks): the running command, by torchrun for more ranks than one."""
    def begin(workflow: Path, ranks: int = 1) -> subprocess.Popen:
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": sys.executable,
                       "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *launcher, SCRIPT, workflow, "--timeout", str(TIMEOUT), "--cpu", "--base-directory", base],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    return begin


@pytest.fixture(scope="module")
def train(start):
    """train(workflow, ranks): what the command prints, once it has ended well."""
    def run(workflow: Path, ranks: int = 1) -> str:
        running = start(workflow, ranks)
        said, _ = running.communicate(timeout=600)
        assert running.returncode == 0, said
        return said
    return run


def weights(base: Path, name: str) -> torch.Tensor:
    """All that a training saved."""
    (folder,) = (base / "output" / "controlnext").glob(f"{name}_*_")
    files = [load_file(folder / f"{part}.safetensors") for part in ("controlnet", "unet")]
    return torch.cat([file[key].flatten() for file in files for key in sorted(file)])


def written(base: Path, name: str) -> list[str]:
    return sorted(path.name for path in (base / "output" / "controlnext_training").glob(f"{name}_*"))


def rows(base: Path, name: str) -> list[dict]:
    (file,) = (base / "output" / "controlnext_training").glob(f"{name}_*_losses.csv")
    return list(csv.DictReader(file.open()))


@pytest.fixture(scope="module")
def alone(url, workflow) -> None:
    """A training on two batches a step, by the server."""
    comfy_client.run_graph(url, json.loads(workflow("alone", grad_accumulation_steps=2).read_text()))


@pytest.fixture(scope="module")
def two(workflow, train) -> str:
    """What two ranks print that train on a batch each."""
    return train(workflow("two", save_every=STEPS // 2), ranks=2)


def test_two_ranks_learn_what_one_process_learns_from_two_batches_a_step(base, alone, two):
    ours, expected = weights(base, "two"), weights(base, "alone")
    assert float((ours - expected).norm() / expected.norm()) <= 1e-6
    losses = [[float(row["loss"]) for row in rows(base, name)] for name in ("two", "alone")]
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_of_several_ranks_writes_and_shows(base, two):
    kept = [name for name in written(base, "two") if name.endswith(".pt")]
    assert kept == [f"two_00001_step_{step}.pt" for step in (STEPS // 2, STEPS)]
    assert two.count(f"0/{STEPS} [00:00<?, ?it/s]") == 1, "progress is one bar"


def test_a_state_that_two_ranks_kept_goes_on_with_one(base, workflow, train, alone, two):
    train(workflow("again", grad_accumulation_steps=2, resume_from=f"two_00001_step_{STEPS // 2}.pt"))
    ours, expected = weights(base, "again"), weights(base, "alone")
    assert float((ours - expected).norm() / expected.norm()) <= 1e-6


def test_a_rank_that_is_killed_ends_all_in_time_with_a_state_kept(base, workflow, start):
    running = start(workflow("killed", steps=100000), ranks=2)
    until = time.monotonic() + 300
    while not written(base, "killed") or len(rows(base, "killed")) < 3:
        assert time.monotonic() < until and running.poll() is None
        time.sleep(0.2)
    ranks = [process for process in psutil.Process(running.pid).children() if str(SCRIPT) in process.cmdline()]
    second = next(process for process in ranks if process.environ()["RANK"] == "1")
    second.send_signal(signal.SIGKILL)
    said, _ = running.communicate(timeout=60 * TIMEOUT + 60)
    assert running.returncode != 0 and not any(process.is_running() for process in ranks)
    (kept,) = [name for name in written(base, "killed") if name.endswith(".pt")]
    assert int(kept.split("_")[-1].removesuffix(".pt")) == len(rows(base, "killed")), said


def test_a_file_that_is_no_training_is_one_sentence(start, tmp_path):
    file = tmp_path / "workflow.json"
    file.write_text('{"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}}')
    running = start(file)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 1
    assert f"Error: {file} holds 0 Train ControlNeXt nodes; one is expected." in said.splitlines()
