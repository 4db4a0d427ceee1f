"""Making a base of the demonstration from many sets of drawings: the sets, and demo_model/make.py from end to end."""

import importlib
import json
import lzma
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo_model import autoencoder, provide, svg_sets
from demo_model.bases import BASES
from demo_model.drawings import DATA, load_held_out
from demo_model.measure import Demonstration

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BASE = BASES["sd3_192"]
NOTO, TWEMOJI, STREAMLINE = (next(name for name in svg_sets.SETS if one in name)
                             for one in ("/noto@", "twemoji", "streamline"))
CHARS = {"2615": "hot-beverage", "1f431": "cat-face", "1f408": "cat", "1f34e": "red-apple", "1f3c0": "basketball",
         "1f3e0": "house", "1f680": "rocket", "1f511": "key", "1f514": "bell", "1f335": "cactus", "1f384": "tree"}
KINDS = {"Animals & Nature": ["cat-face", "cat", "cactus", "tree"], "Food & Drink": ["hot-beverage", "red-apple"],
         "Objects": ["key", "bell"], "Activities": ["basketball"],
         "Travel & Places": ["house", "rocket", "one-oclock"],
         "People & Body": ["farmer", "farmer-dark-skin-tone"], "Smileys & Emotion": ["grinning-face"]}
HELD_OUT = ["hot beverage", "cat"]
FEW = ["cat", "farmer"]  # drawings of the chain, which takes a third of a second for each picture


def colour(number: int) -> str:
    return f"#{40 * number % 256:02x}{90 * number % 256:02x}{150 * number % 256:02x}"


def write_set(folder: Path, package: str, names: list[str], chars: dict[str, str], kinds: dict) -> None:
    """An npm package in Iconify's format, unpacked; the drawings are coloured circles and squares."""
    files = folder / package.split("/")[1] / "package"
    files.mkdir(parents=True)
    shapes = ('<circle cx="10" cy="10" r="{}" fill="{}"/>', '<path d="M3 3h{0}v{0}H3z" fill="{1}"/>')
    icons = {name: {"body": shapes[number % 2].format(6 + number % 3, colour(number + len(package)))}
             for number, name in enumerate(names)}
    parts = {"icons": {"width": 20, "height": 20, "icons": icons}, "chars": chars, "metadata": {"categories": kinds}}
    for name, part in parts.items():
        (files / f"{name}.json").write_text(json.dumps(part))


@pytest.fixture(scope="module")
def gathered(tmp_path_factory) -> Path:
    """A folder with the file of all drawings, made of small stand-ins of the packages."""
    folder = tmp_path_factory.mktemp("drawings")
    in_other_sets = {
        TWEMOJI: (["cat", "kitten", "tea", "apple", "ornament"],
                  {"1f408": "kitten", "1f431": "cat", "2615": "tea", "1f34e": "apple", "2618": "ornament"}),
        STREAMLINE: (["bell-1", "bell-2", "cat-1", "logo"], {})}
    write_set(folder, NOTO, [name for names in KINDS.values() for name in names], CHARS, KINDS)
    for package in list(svg_sets.SETS)[1:]:
        write_set(folder, package, *in_other_sets.get(package, ([], {})), {})
    svg_sets.gather(folder, folder / svg_sets.FILE, HELD_OUT, more=6)
    return folder


@pytest.fixture(scope="module")
def drawings(gathered):
    return DATA["sets"].read(gathered)


def test_drawings_of_all_sets_have_the_names_that_the_first_has(drawings):
    noto = ["cat face", "cat", "cactus", "tree", "hot beverage", "red apple", "key", "bell", "basketball", "house",
            "rocket", "farmer"]
    assert drawings.captions == [*noto, "cat face", "cat", "hot beverage", "red apple", "cat", "bell"]
    assert drawings.pictures.shape == (18, 192, 192, 3)


def test_a_drawing_that_is_not_square_is_in_the_middle_of_white_paper():
    ink = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><path d="M0 0h20v10H0z"/></svg>'
    above, drawn, below = np.split(svg_sets.picture(ink, 64), [16, 48])
    assert (above == 255).all() and not drawn.any() and (below == 255).all()


def test_a_thing_is_held_out_in_every_set_and_people_are_not(drawings):
    held_out = {drawings.captions[row] for row in drawings.held_out}
    assert len(held_out) == 8 and held_out >= set(HELD_OUT) and "farmer" not in held_out
    assert not held_out & {drawings.captions[row] for row in drawings.training}


def test_a_name_that_the_first_set_lacks_cannot_be_held_out(gathered, tmp_path):
    with pytest.raises(KeyError, match="unicorn"):
        svg_sets.gather(gathered, tmp_path / svg_sets.FILE, ["unicorn"])


def test_drawings_are_on_white_paper(drawings):
    for number, picture in enumerate(drawings.pictures[:4]):
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
        assert "#{:02x}{:02x}{:02x}".format(*picture[70, 70]) == colour(number + len(NOTO))


def test_a_matrix_in_eight_bits_is_itself_to_a_254th_of_each_rows_largest_number():
    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 40)[:, None]
    tensors = {"weight": matrix, "bias": torch.ones(3)}
    stored = provide.in_eight_bits(tensors)
    assert stored["weight"].dtype == torch.int8
    back = provide.out_of_eight_bits(stored)
    assert back.keys() == tensors.keys() and torch.equal(back["bias"], tensors["bias"])
    apart = (back["weight"].float() - matrix).abs().amax(1) / matrix.abs().amax(1)
    assert apart.max() < 1.1 / 254


@pytest.fixture(scope="module")
def made(run, models_folder, gathered, tmp_path_factory):
    """The base in its real size after a step of each stage, two of its first, in two goes; the autoencoder's steps."""
    folder, weights = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("weights")
    base = replace(BASE, steps=dict.fromkeys(BASE.steps, 1) | {"autoencoder": 2},
                   batches=dict.fromkeys(BASE.batches, 2), variations=(1, 1))
    whole = json.loads(lzma.decompress((gathered / svg_sets.FILE).read_bytes()))
    few = whole | {"drawings": [drawing for drawing in whole["drawings"] if drawing[0] in FEW]}
    (folder / svg_sets.FILE).write_bytes(lzma.compress(json.dumps(few).encode()))

    steps, forward = [], autoencoder.Autoencoder.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", list(sys.path))
        make = importlib.import_module("demo_model.make")
        patch.setattr(autoencoder.Autoencoder, "forward", lambda *args: steps.append(args) or forward(*args))
        counts = []
        for share, stages in ((0.5, ["autoencoder"]), (1.0, make.stages_of(base))):
            making = make.Making(base, folder, weights, share, data=folder,
                                 new_pack=lambda: SimpleNamespace(run=run, models=models_folder))
            making.make(stages)
            counts.append(len(steps))
            steps.clear()
    return SimpleNamespace(weights=weights, making=making, counts=counts)


def test_a_making_goes_on_where_it_was(made):
    assert made.counts == [1, 1 + 1]  # the decoder's one
    assert {file.name for file in made.making.folder.glob("*.pt")} == {
        f"sd3_192_{part}.pt" for part in ("autoencoder", "decoder", "denoiser", "texts", "encoded")}


def test_what_is_made_is_less_than_60_mb_and_replaces_nothing(made):
    names = {f"sd3_192_{kind}_{part}.safetensors" for kind in ("canny", "mask", "super_resolution")
             for part in ("controlnet", "unet")}
    assert {file.name for file in made.weights.iterdir()} == {
        *names, "sd3_192.safetensors", "held_out_sets.png", "held_out_sets.txt"}
    assert not {file.name for file in made.weights.iterdir()} & {file.name for file in provide.WEIGHTS.iterdir()}
    assert sum(file.stat().st_size for file in made.weights.iterdir()) < 60e6
    pictures, captions = load_held_out(made.weights, "sets")
    assert pictures.shape == (1, 192, 192, 3) and captions == ["cat"]


def test_the_stock_nodes_draw_with_what_is_made(run, models_folder, made):
    for file in made.weights.glob("*_canny_*"):
        (models_folder / "controlnext" / f"drawings_{file.name}").write_bytes(file.read_bytes())
    pictures, captions = load_held_out(made.weights, "sets")
    demonstration = Demonstration(run, pictures[:1], captions[:1], base=BASE.name, steps=2)
    off, on = demonstration.draw(1), demonstration.draw(1, "canny", demonstration.edges(demonstration.images))
    assert on.shape == (1, 192, 192, 3) and on.isfinite().all()
    assert not torch.equal(on, off)
    stored = provide.part(provide.out_of_eight_bits(load_file(made.weights / "sd3_192.safetensors")), provide.UNET)
    loaded = demonstration.model.model.diffusion_model
    assert len(loaded.joint_blocks) == 5
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    assert torch.equal(loaded.state_dict()[name].float(), stored[name].float())
