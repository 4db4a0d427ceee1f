"""Pictures of a folder with their captions, as people collect them: which there are, and reading one right."""

import os
from dataclasses import dataclass

import comfy.utils
import numpy as np
import torch
from PIL import Image, ImageOps

from ..runtime.images import RESIZING

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # those of ComfyUI's own nodes that load folders
CAPTION = ".txt"
STEPS = (64, 32, 16)  # pixels; sides are multiples of the first one that divides the size
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A picture in a folder.

    Attributes:
        name: relative to the folder, without its ending.
        path: of its file.
        repeats: how often it counts: the number that its own folder's name begins with, as in kohya's ``10_cat``.
    """

    name: str
    path: str
    repeats: int = 1

    @property
    def caption(self) -> str:
        """The text beside it, empty where there is none."""
        path = os.path.splitext(self.path)[0] + CAPTION
        if not os.path.isfile(path):
            return ""
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read().strip()


def pictures_in(folder: str) -> list[Picture]:
    """The pictures of a folder and of the folders in it, by their names."""
    found = [(entry.path, 1) for entry in os.scandir(folder) if _is_picture(entry)]
    for inner in (entry for entry in os.scandir(folder) if entry.is_dir()):
        number = inner.name.split("_")[0]
        repeats = int(number) if number.isdigit() else 1
        found += [(entry.path, repeats) for entry in os.scandir(inner.path) if _is_picture(entry)]
    return [Picture(os.path.splitext(os.path.relpath(path, folder))[0], path, repeats)
            for path, repeats in sorted(found)]


def _is_picture(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(ENDINGS) and entry.is_file()


def size_of(path: str) -> tuple[int, int]:
    """(height, width) as ``read_picture`` gives them, from the file's head. Raises what Pillow raises."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF's orientations that exchange the sides
    return (width, height) if turned else (height, width)


def read_picture(path: str) -> torch.Tensor:
    """A picture (1, H, W, 3) in [0, 1]: upright, in RGB, on white where it is transparent.

    Raises what Pillow raises where a file is no whole picture.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of gray
            gray = np.asarray(image, np.float32) / 65535
            return torch.from_numpy(gray)[None, ..., None].clamp(0, 1).expand(-1, -1, -1, 3).contiguous()
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (*WHITE, 255))
            image = Image.alpha_composite(white, image)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels.astype(np.float32) / 255.0)[None]


def bucket_size(height: int, width: int, size: int, keeps_shape: bool) -> tuple[int, int]:
    """(height, width) to which a picture is brought: about size x size pixels, its shape kept or square.

    Args:
        size: side of a square; a multiple of the last of ``STEPS``.
    """
    if not keeps_shape:
        return size, size
    step = next(step for step in STEPS if size % step == 0)
    scale = size / (height * width) ** 0.5
    return tuple(max(round(side * scale / step), 1) * step for side in (height, width))


def resized(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(1, H, W, 3) scaled to fill a size (height, width), and cut in the middle."""
    height, width = size
    if tuple(picture.shape[1:3]) == (height, width):
        return picture
    return comfy.utils.common_upscale(picture.movedim(-1, 1), width, height, RESIZING, "center").movedim(1, -1)
