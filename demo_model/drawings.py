"""The drawings to learn, on white paper, with their names: animals, food, things and activities of Noto emoji, or more.

Faces are left out: nearly all of them are the same circle, so a picture without control would agree with them as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from demo_model import svg_sets
from demo_model.bases import WEIGHTS
from demo_model.packages import fetched

PACKAGE = "emoji-datasource-google@16.0.0"  # an npm package, MIT; the drawings are Google's, Apache-2.0
CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Activities")
SIZE = 96  # pixels on a side, of the drawings and of what the model makes
HELD_OUT = 64


@dataclass
class Drawings:
    """Pictures (N, size, size, 3) uint8 RGB and their captions; `held_out` are indices that no training sees."""

    pictures: np.ndarray
    captions: list[str]
    held_out: np.ndarray

    @property
    def training(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.captions)), self.held_out)

    @property
    def texts(self) -> list[str]:
        """Each caption once and, last, the empty one."""
        return [*dict.fromkeys(self.captions), ""]


def load_drawings(folder: Path, data: str = "noto") -> Drawings:
    """Read the drawings of a data set, after fetching them into `folder` with npm on the first call."""
    return DATA[data].read(folder)


def read_noto(folder: Path) -> Drawings:
    """Noto emoji of four categories, one a thing."""
    package = fetched(PACKAGE, folder)
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    entries = sorted((entry for entry in entries if entry["category"] in CATEGORIES and entry["has_img_google"]),
                     key=lambda entry: entry["sort_order"])

    files = [package / "img/google/64" / entry["image"] for entry in entries]
    pictures = [on_white(cv2.imread(str(file), cv2.IMREAD_UNCHANGED)) for file in files]
    captions = [entry["name"].lower() for entry in entries]
    held_out = np.sort(np.random.default_rng(0).permutation(len(captions))[:HELD_OUT])
    return Drawings(np.stack(pictures), captions, held_out)


def gathered(folder: Path) -> Path:
    """The file with the drawings of many sets. What Noto's held-out drawings show is held out there, too."""
    file = folder / svg_sets.FILE
    if not file.is_file():
        svg_sets.gather(folder, file, load_held_out(WEIGHTS)[1])
    return file


def read_sets(folder: Path) -> Drawings:
    """Drawings of many sets, several a thing."""
    return Drawings(*svg_sets.read_gathered(gathered(folder), DATA["sets"].size))


@dataclass(frozen=True)
class DataSet:
    """A set of drawings.

    Attributes:
        read: its drawings from a folder, which is to keep what it fetches.
        size: pixels on a side.
        held_out: name of the two files, among weights, with drawings that no training sees and their captions.
    """

    read: Callable[[Path], Drawings]
    size: int
    held_out: str


DATA = {"noto": DataSet(read_noto, SIZE, "held_out"), "sets": DataSet(read_sets, 192, "held_out_sets")}


def save_held_out(drawings: Drawings, folder: Path, data: str = "noto") -> None:
    """Write a held-out drawing of each thing into one picture, 8 in a row at most, and their captions, a line each."""
    captions = [drawings.captions[index] for index in drawings.held_out]
    shown = dict.fromkeys(captions)
    rows = drawings.held_out[[captions.index(caption) for caption in shown]]
    size, name, across = drawings.pictures.shape[1], DATA[data].held_out, min(8, len(rows))
    grid = drawings.pictures[rows].reshape(-1, across, size, size, 3)
    sheet = grid.transpose(0, 2, 1, 3, 4).reshape(-1, across * size, 3)
    cv2.imwrite(str(folder / f"{name}.png"), sheet[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    (folder / f"{name}.txt").write_text("\n".join(shown) + "\n", encoding="utf-8", newline="\n")


def load_held_out(folder: Path, data: str = "noto") -> tuple[np.ndarray, list[str]]:
    """The held-out drawings of a data set (N, size, size, 3), uint8 RGB, and their captions."""
    size, name = DATA[data].size, DATA[data].held_out
    sheet = cv2.cvtColor(cv2.imread(str(folder / f"{name}.png")), cv2.COLOR_BGR2RGB)
    grid = sheet.reshape(-1, size, sheet.shape[1] // size, size, 3)
    captions = (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3), captions


def on_white(bgra: np.ndarray) -> np.ndarray:
    """A drawing with transparency (H, W, 4) on white paper, as RGB (SIZE, SIZE, 3)."""
    alpha = bgra[..., 3:].astype(np.float32) / 255
    rgb = bgra[..., 2::-1] * alpha + 255 * (1 - alpha)
    return cv2.resize(rgb.round().astype(np.uint8), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def draw_variations(count: int, generator: torch.Generator, mirrored: float = 0.5) -> torch.Tensor:
    """Affine maps (count, 2, 3), as `affine_grid` takes them: a share `mirrored`, a little turned, scaled and moved.

    They are on the generator's device.
    """
    def chances() -> torch.Tensor:
        return torch.rand(count, generator=generator, device=generator.device)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * chances()

    angle, zoom = uniform(-math.pi / 30, math.pi / 30), 1 / uniform(0.85, 1.05)
    mirror = (chances() >= mirrored).float() * 2 - 1
    shift_x, shift_y = uniform(-0.06, 0.06), uniform(-0.06, 0.06)
    rows = [torch.stack([mirror * zoom * angle.cos(), -mirror * zoom * angle.sin(), shift_x], 1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift_y], 1)]
    return torch.stack(rows, 1)


def vary(images: torch.Tensor, variations: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] under `variations` (N, 2, 3), with white paper around them."""
    grid = F.affine_grid(variations, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def to_images(drawings: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [0, 1]."""
    return drawings.permute(0, 3, 1, 2).float() / 255


def to_drawings(images: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] to (N, H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
