"""scripts/demo.py as people call it."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error

import demo
import environment
import pytest
from comfy_client import open_url
from PIL import Image

SIZE = (128, 96)
DEMO = environment.REPOSITORY / "scripts" / "demo.py"


@pytest.fixture(scope="module")
def command(base, comfyui, tmp_path_factory):
    """command(*arguments): the running demo, with a cache folder of its own that holds the random weights already."""
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(base / "models", cache / "base" / "models", copy_function=os.link)
    variables = {"CONTROLNEXT_CACHE": cache, "COMFYUI_PYTHON": sys.executable, "COMFYUI_PATH": comfyui}

    def start(*arguments) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, DEMO, "--size", "{}x{}".format(*SIZE), "--steps", "2", *arguments],
                                env=os.environ | {name: str(value) for name, value in variables.items()},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


def test_the_demo_says_where_the_picture_is_and_stays_open_until_it_is_ended(command):
    with command("--keep-open") as running:
        lines = []
        for line in running.stdout:
            lines.append(line)
            if line.startswith("ComfyUI is open"):
                break
        else:
            pytest.fail(running.stderr.read())
        text = "".join(lines)
        url = re.search(r"http://\S+", lines[-1])[0]
        open_url(url).close()
        running.terminate()
        assert running.wait(20) == 143
    with pytest.raises(urllib.error.URLError):
        open_url(url)
    assert "random numbers" in text
    assert "KSampler" in text and "step 2 of 2" in text
    assert Image.open(re.search(r"^Picture: (.*)$", text, re.M)[1]).size == SIZE
    assert Image.open(re.search(r"side by side: (.*)$", text, re.M)[1]).size == (3 * SIZE[0], SIZE[1])


def test_the_demo_ends_with_comfyuis_sentence_when_a_node_fails(command, full_controlnet):
    running = command("--controlnext", full_controlnet)
    output, errors = running.communicate(timeout=300)
    assert running.returncode == 1
    assert errors.splitlines()[-1].startswith("Error: ControlNeXtLoader: controlnext_name: ")
    assert full_controlnet.name in errors.splitlines()[-1]
    url = re.search(r"http://\S+", output)[0]
    with pytest.raises(urllib.error.URLError):
        open_url(url)


@pytest.mark.parametrize("arguments, complaint", [
    (["--size", "500"], "500 is not a size"),
    (["--size", "64x64x64"], "64x64x64 is not a size"),
    (["--checkpoint", "missing.safetensors"], "there is no file missing.safetensors"),
])
def test_arguments_that_cannot_work_are_refused_at_once(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        demo.parse_arguments(arguments)
    assert complaint in capsys.readouterr().err


def test_a_given_weight_file_is_linked_and_never_replaces_one_in_the_models_folder(tmp_path):
    models, mine = tmp_path / "models", tmp_path / "controlnet.safetensors"
    models.mkdir()
    (models / mine.name).write_text("the user's own")
    mine.write_text("given")
    name = demo.put_weights(mine, models)
    assert (models / name).read_text() == "given"
    assert demo.put_weights(models / name, models) == name
    assert (models / name).read_text() == "given"
    assert (models / mine.name).read_text() == "the user's own"


def test_a_comfyui_path_without_comfyui_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setenv("CONTROLNEXT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(environment.SetupError, match="holds no main.py"):
        environment.set_up()


def test_a_base_directory_follows_the_repository_when_it_moves(tmp_path):
    base = environment.base_directory(tmp_path)
    link = base / "custom_nodes" / "ComfyUI-ControlNeXt"
    assert link.samefile(environment.REPOSITORY)
    link.unlink()
    link.symlink_to(tmp_path / "where it was before")
    environment.base_directory(tmp_path)
    assert link.samefile(environment.REPOSITORY)
