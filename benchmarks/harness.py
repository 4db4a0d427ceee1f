"""The benchmarks' harness: a real ComfyUI in this process with the pack in it, full-size UNets, and reports."""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent

sys.path[1:1] = [str(REPOSITORY / folder) for folder in ("scripts", "tests/comfy", "tests/goldens")]
import environment  # noqa: E402
import in_process  # noqa: E402
import stand_in  # noqa: E402
from peak_memory import PeakMemory, give_back_memory, memory_status  # noqa: E402, F401

DEPTHS = {  # transformer depths of released UNets, where the tests' ones are cut
    "sdxl": {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3,
             "transformer_depth_middle": 10},
}


def enter(*options: str) -> None:
    """Go on in the Python that runs ComfyUI (``environment.enter``); ComfyUI can be imported afterwards.

    Args:
        options: more options of ComfyUI's command line.
    """
    comfyui, base = environment.enter(), Path(tempfile.mkdtemp(prefix="controlnext-benchmark-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    in_process.start_comfyui(comfyui, base, *options)
    logging.getLogger().setLevel(logging.ERROR)


class Pack(in_process.Pack):
    """The pack and ComfyUI's nodes, with what the benchmarks load."""

    def controlnext(self, variant: str):
        """A CONTROLNEXT of the light layout (sd15, sdxl and svd) with seeded random weights."""
        from safetensors.torch import save_file
        file = self.models / "controlnext" / f"{variant}.safetensors"
        save_file(stand_in.random_weights(stand_in.controlnext_shapes(), seed=0), file)
        return self.run("ControlNeXtLoader", controlnext_name=file.name, variant=variant)

    def put_control(self, folder: Path, prefix: str, kind: str) -> None:
        """Copy a trained control's files to where the demonstration of a base with this prefix loads this kind."""
        for file in folder.iterdir():
            shutil.copyfile(file, self.models / "controlnext" / f"{prefix}{kind}_{file.name}")

    def demonstration(self, drawings: np.ndarray, captions: list[str], cfg: float = 1.0, base: str = "sd15"):
        """The demonstration's trained model of a base, drawing for these captions (demo_model/measure.py)."""
        from demo_model import provide
        from demo_model.measure import Demonstration
        provide.provide(Path(os.environ["COMFYUI_PATH"]), self.models)
        return Demonstration(self.run, drawings, captions, cfg, base)


def unet(base: str, dtype: torch.dtype, cut: bool):
    """A MODEL of ComfyUI's class for ``base`` with seeded random weights and the released widths.

    ``cut`` leaves SDXL's transformers one block deep, as a small machine needs it; the others are never cut.
    """
    import torch
    from models import unet_model
    model = unet_model(base, dtype, **({} if cut else DEPTHS.get(base, {})))
    fill(model.model.diffusion_model, torch.Generator().manual_seed(0))
    return model


def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Seeded random weights that keep the size of what goes through."""
    import torch
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.5)


def machine() -> dict:
    """The device, the system and the versions that the figures were measured with."""
    import comfyui_version
    import torch
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        device = f"CPU {names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    return {"device": device, "system": platform.platform(terse=True), "python": platform.python_version(),
            "torch": torch.__version__, "comfyui": comfyui_version.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def save_sheet(name: str, rows: list) -> None:
    """Write rows of pictures, each (N, H, W, 3) from 0 to 1, as results/NAME.jpg."""
    import cv2
    import numpy as np
    sheet = np.concatenate([np.concatenate([*row.float().numpy()], axis=1) for row in rows])
    sheet = (sheet * 255).round().astype(np.uint8)
    cv2.imwrite(str(FOLDER / "results" / f"{name}.jpg"), sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


def report(name: str, title: str, header: list[str], rows: list[list[str]], data: dict) -> None:
    """Print a table and write it with ``data`` to results/NAME.json."""
    print(f"\n{title}\n\n{table(header, rows)}", flush=True)
    file = FOLDER / "results" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    data = {"title": title, "machine": machine(), "table": [header, *rows], **data}
    file.write_text(json.dumps(data, indent=1) + "\n")
    print(f"\nWritten to {file.relative_to(REPOSITORY)}")


def table(header: list[str], rows: list[list[str]]) -> str:
    """The table in Markdown."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join(map(line, [header, ["-" * width for width in widths], *rows]))
