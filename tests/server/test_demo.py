"""scripts/demo.py as people call it."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error

import demo
import environment
import numpy as np
import pytest
import stand_in
from comfy_client import open_url
from PIL import Image

from demo_model import provide

DEMO = environment.REPOSITORY / "scripts" / "demo.py"


@pytest.fixture(scope="module")
def command(base, comfyui, tmp_path_factory):
    """command(*arguments): the running demo, with a cache folder of its own that holds the weights already."""
    cache = tmp_path_factory.mktemp("cache")
    provide.provide(comfyui, base / "models")
    shutil.copytree(base / "models", cache / "base" / "models", copy_function=os.link)
    variables = {"CONTROLNEXT_CACHE": cache, "COMFYUI_PYTHON": sys.executable, "COMFYUI_PATH": comfyui}

    def start(*arguments) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, DEMO, *arguments],
                                env=os.environ | {name: str(value) for name, value in variables.items()},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    start.models = cache / "base" / "models"
    return start


def test_the_demo_says_where_the_picture_is_and_stays_open_until_it_is_ended(command):
    with command("--keep-open", "--steps", "5") as running:
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
    assert "KSampler" in text and "step 5 of 5" in text
    assert Image.open(re.search(r"^Picture: (.*)$", text, re.M)[1]).size == demo.OWN["size"]
    photo, edges, picture = np.split(np.array(Image.open(re.search(r"side by side: (.*)$", text, re.M)[1])), 3, axis=1)
    assert picture.shape == (384, 384, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert photo.std() > 30


def test_weights_that_are_there_are_not_made_again(command, comfyui):
    before = [(command.models / folder / name).stat().st_mtime_ns for name, folder in provide.FILES.items()]
    provide.provide(comfyui, command.models)
    assert [(command.models / folder / name).stat().st_mtime_ns for name, folder in provide.FILES.items()] == before


def test_the_demo_ends_with_comfyuis_sentence_when_a_node_fails(command, base, full_controlnet):
    running = command("--checkpoint", base / "models" / "checkpoints" / stand_in.CHECKPOINT,
                      "--controlnext", full_controlnet, "--size", "128x96", "--steps", "2")
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
    (["--checkpoint", __file__], "--checkpoint and --controlnext belong together"),
    (["--controlnext", __file__], "--checkpoint and --controlnext belong together"),
    (["--unet-weights", __file__], "--unet-weights only to them"),
])
def test_arguments_that_cannot_work_are_refused_at_once(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        demo.parse_arguments(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("given, defaults", [((), demo.OWN), (("--checkpoint", "--controlnext"), demo.GIVEN)])
def test_defaults_suit_the_model_and_what_is_asked_for_goes_before_them(given, defaults):
    files = [argument for name in given for argument in (name, __file__)]
    options = vars(demo.parse_arguments([*files, "--negative", "", "--cfg", "1.5"]))
    assert {name: options[name] for name in defaults} == defaults | {"negative": "", "cfg": 1.5}


def test_a_transparent_drawing_is_on_white_paper(tmp_path):
    drawing = np.zeros((64, 128, 4), np.uint8)
    drawing[:, :64] = (200, 30, 30, 255)
    Image.fromarray(drawing).save(tmp_path / "drawing.png")
    photo = np.array(Image.open(demo.put_photo(tmp_path / "drawing.png", (128, 64), tmp_path)))
    assert (photo[:, :60] == (200, 30, 30)).all() and (photo[:, 68:] == 255).all()


def test_a_picture_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"--image: .*{DEMO.name} is not a picture"):
        demo.put_photo(DEMO, (64, 64), tmp_path)


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
