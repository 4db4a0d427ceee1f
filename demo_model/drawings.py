"""The drawings to learn: animals, food, things and activities (Noto emoji) on white paper, with their names.

Faces are left out: nearly all of them are the same circle, so a picture without control would agree with them as well.
"""

from __future__ import annotations

import json
import math
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

PACKAGE = "emoji-datasource-google@16.0.0"  # an npm package, MIT; the drawings are Google's, Apache-2.0
CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Activities")
SIZE = 96  # pixels on a side, of the drawings and of what the model makes
HELD_OUT = 64


@dataclass
class Drawings:
    """Pictures (N, SIZE, SIZE, 3) uint8 RGB and their captions; `held_out` are indices that no training sees."""

    pictures: np.ndarray
    captions: list[str]
    held_out: np.ndarray

    @property
    def training(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.captions)), self.held_out)


def load_drawings(folder: Path) -> Drawings:
    """Read the drawings, after fetching the package into `folder` with npm on the first call."""
    package = folder / "package"
    if not package.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.PIPE)
        with tarfile.open(folder / packed.stdout.decode().split()[-1]) as archive:
            archive.extractall(folder, filter="data")

    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    entries = sorted((entry for entry in entries if entry["category"] in CATEGORIES and entry["has_img_google"]),
                     key=lambda entry: entry["sort_order"])

    files = [package / "img/google/64" / entry["image"] for entry in entries]
    pictures = [on_white(cv2.imread(str(file), cv2.IMREAD_UNCHANGED)) for file in files]
    captions = [entry["name"].lower() for entry in entries]
    held_out = np.sort(np.random.default_rng(0).permutation(len(captions))[:HELD_OUT])
    return Drawings(np.stack(pictures), captions, held_out)


def save_held_out(drawings: Drawings, folder: Path) -> None:
    """Write the held-out drawings as one picture, 8 in a row, and their captions, a line each."""
    rows = drawings.pictures[drawings.held_out].reshape(-1, 8, SIZE, SIZE, 3)
    sheet = rows.transpose(0, 2, 1, 3, 4).reshape(-1, 8 * SIZE, 3)
    cv2.imwrite(str(folder / "held_out.png"), sheet[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    captions = [drawings.captions[index] for index in drawings.held_out]
    (folder / "held_out.txt").write_text("\n".join(captions) + "\n", encoding="utf-8", newline="\n")


def load_held_out(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The held-out drawings (HELD_OUT, SIZE, SIZE, 3), uint8 RGB, and their captions."""
    sheet = cv2.imread(str(folder / "held_out.png"))[..., ::-1]
    drawings = sheet.reshape(-1, SIZE, 8, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIZE, SIZE, 3)
    return drawings, (folder / "held_out.txt").read_text(encoding="utf-8").splitlines()


def on_white(bgra: np.ndarray) -> np.ndarray:
    """A drawing with transparency (H, W, 4) on white paper, as RGB (SIZE, SIZE, 3)."""
    alpha = bgra[..., 3:].astype(np.float32) / 255
    rgb = bgra[..., 2::-1] * alpha + 255 * (1 - alpha)
    return cv2.resize(rgb.round().astype(np.uint8), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def draw_variations(count: int, generator: torch.Generator, mirrored: float = 0.5) -> torch.Tensor:
    """Affine maps (count, 2, 3), as `affine_grid` takes them: a share `mirrored`, a little turned, scaled and moved."""
    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, zoom = uniform(-math.pi / 30, math.pi / 30), 1 / uniform(0.85, 1.05)
    mirror = (torch.rand(count, generator=generator) >= mirrored).float() * 2 - 1
    shift_x, shift_y = uniform(-0.06, 0.06), uniform(-0.06, 0.06)
    rows = [torch.stack([mirror * zoom * angle.cos(), -mirror * zoom * angle.sin(), shift_x], 1),
            torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift_y], 1)]
    return torch.stack(rows, 1)


def vary(images: torch.Tensor, variations: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] under `variations` (N, 2, 3), with white paper around them."""
    grid = F.affine_grid(variations, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def to_images(drawings: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(drawings)).permute(0, 3, 1, 2).float() / 255


def to_drawings(images: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] to (N, H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
