"""Many drawings of each thing: open sets of emoji as SVG, gathered into one small file that travels, and rasterised.

The things, their names and kinds are those of Noto, the first set. Drawings of other sets count where they are of one
of these, one a thing and set, so that a thing that is held out is held out in all of them.
"""

from __future__ import annotations

import json
import lzma
import math
import multiprocessing
import os
import re
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from demo_model.packages import fetched

FILE = "drawings.json.xz"
# npm packages, and whose drawings they hold under which licence
SETS = {
    "@iconify-json/noto@1.2.9": "Noto Emoji, Google, Apache-2.0",
    "@iconify-json/noto-v1@1.2.5": "Noto Emoji before 2017, Google, Apache-2.0",
    "@iconify-json/twemoji@1.2.5": "Twemoji, Twitter and contributors, CC-BY-4.0",
    "@iconify-json/openmoji@1.2.29": "OpenMoji, HfG Schwäbisch Gmünd, CC-BY-SA-4.0",
    "@iconify-json/fluent-emoji-flat@1.2.6": "Fluent Emoji Flat, Microsoft, MIT",
    "@iconify-json/emojione@1.2.3": "EmojiTwo, from Emoji One 2.3, CC-BY-4.0",
    "@iconify-json/emojione-v1@1.2.3": "Emoji One 1.5.2, CC-BY-SA-4.0",
    "@iconify-json/streamline-emojis@1.2.4": "Streamline Emojis, CC-BY-4.0",
}
THINGS = ("Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places")
PEOPLE = ("People & Body",)
# skin tones, and clock faces, which are nearly all the same circle
LEFT_OUT = re.compile("skin-tone|-oclock$|-thirty$")
MORE_HELD_OUT = 64
EACH = 64  # drawings that a process draws at once


@dataclass(frozen=True)
class IconSet:
    """One set.

    Attributes:
        svgs: {name in the set: drawing}.
        chars: {code points: name in the set}; empty where the package does not tell.
        kinds: {kind: names}.
    """

    svgs: dict[str, str]
    chars: dict[str, str]
    kinds: dict[str, list[str]]


def read_set(folder: Path) -> IconSet:
    """A set in Iconify's JSON format."""
    icons, chars, metadata = (json.loads((folder / name).read_text(encoding="utf-8"))
                              for name in ("icons.json", "chars.json", "metadata.json"))

    def svg(icon: dict) -> str:
        left, top, width, height = (icon.get(side, icons.get(side, default)) for side, default in
                                    (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
        return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>')

    return IconSet({name: svg(icon) for name, icon in icons["icons"].items()}, chars, metadata.get("categories", {}))


def gather(packages: Path, file: Path, held_out: list[str], more: int = MORE_HELD_OUT) -> None:
    """Write the drawings of all sets into `file`, after fetching with npm what `packages` does not hold.

    Args:
        held_out: names of things that are held out, by Unicode or as Noto has them.
        more: number of things that are held out beside them.

    Raises:
        KeyError: Noto has no such thing.
    """
    sets = [read_set(fetched(package, packages / package.split("/")[1])) for package in SETS]
    noto = sets[0]
    things, people = ([name for kind in kinds for name in noto.kinds[kind] if not LEFT_OUT.search(name)]
                      for kinds in (THINGS, PEOPLE))
    known = dict.fromkeys([*things, *people])

    drawings = []
    for one in sets:
        own, codes = {}, {name: code for code, name in one.chars.items()}
        for name, svg in one.svgs.items():
            # some sets number drawings of one thing
            thing = noto.chars.get(codes.get(name), re.sub(r"-\d$", "", name))
            if thing in known:
                own.setdefault(thing, svg)
        drawings += [(thing, own[thing]) for thing in known if thing in own]

    called = {thing.replace("-", " "): thing for thing in noto.svgs}
    called |= {unicodedata.name(chr(int(code, 16)), "").lower(): thing
               for code, thing in noto.chars.items() if "-" not in code}
    kept = [called[name] for name in held_out]
    others = sorted(set(things) - set(kept))
    kept += [others[row] for row in np.random.RandomState(0).permutation(len(others))[:more]]

    text = json.dumps({"held_out": [thing.replace("-", " ") for thing in kept], "licences": SETS,
                       "drawings": [(thing.replace("-", " "), svg) for thing, svg in drawings]})
    file.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file.with_suffix(".part"), "wt", encoding="utf-8", preset=9) as part:
        part.write(text)
    os.replace(file.with_suffix(".part"), file)


def read_gathered(file: Path, size: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(pictures (N, size, size, 3) uint8 RGB, their captions, the indices of those that are held out)."""
    with lzma.open(file, "rt", encoding="utf-8") as text:
        gathered = json.load(text)
    captions, svgs = zip(*gathered["drawings"], strict=True)
    held_out = np.isin(captions, gathered["held_out"]).nonzero()[0]
    return rasterised(svgs, size), list(captions), held_out


def rasterised(svgs: tuple[str, ...], size: int) -> np.ndarray:
    """Drawings (N, size, size, 3) uint8 RGB on white paper, by several processes, since resvg-py keeps the GIL."""
    workers = min(os.cpu_count(), math.ceil(len(svgs) / EACH))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return np.stack(list(pool.map(partial(picture, size=size), svgs, chunksize=EACH)))


def picture(svg: str, size: int) -> np.ndarray:
    """One of them, in the middle where it is not square."""
    import resvg_py
    png = resvg_py.svg_to_bytes(svg, width=size, height=size, background="white", skip_system_fonts=True)
    drawn = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

    height, width = drawn.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    return cv2.copyMakeBorder(drawn, top, size - height - top, left, size - width - left, cv2.BORDER_CONSTANT,
                              value=(255, 255, 255))
