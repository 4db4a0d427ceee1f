"""Shared by every test: the core as a package of its own, and the goldens."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
GOLDENS = REPO / "tests" / "goldens"


def load_package(name: str, folder: Path):
    """Import a package by its path: with the repository on sys.path, its ``nodes`` would shadow ComfyUI's."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load_package("controlnext_core", REPO / "controlnext_core")
from controlnext_core.families import FAMILIES  # noqa: E402


class Goldens:
    """Numbers computed with the reference implementation, and the inputs and weights that they belong to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.weights = load_module("reference_weights", folder / "reference_weights.py")
        self.module = json.loads((folder / "module.json").read_text())["variants"]
        self.unet = json.loads((folder / "unet.json").read_text())["variants"]
        self.unet_shapes = json.loads((folder / "unet_shapes.json").read_text())
        self._state_dicts: dict[str, dict] = {}

    def state_dict(self, variant: str) -> dict:
        """The control module's weights, float32 torch tensors."""
        import torch
        if variant not in self._state_dicts:
            filled = self.weights.fill_(self.module[variant]["state_dict_shapes"], 7)
            self._state_dicts[variant] = {key: torch.from_numpy(value) for key, value in filled.items()}
        return {key: value.clone() for key, value in self._state_dicts[variant].items()}

    def input(self, described: dict):
        """One input tensor from its description in the JSON files."""
        import torch
        if described["kind"] == "given":
            return torch.tensor(described["value"])
        draw = getattr(self.weights, described["kind"])
        return torch.from_numpy(draw(described["seed"], described["key"], described["shape"]))

    def difference(self, file: str, saved: dict, output) -> float:
        """Largest difference of ``output`` from the saved one, as a share of that one's standard deviation."""
        from safetensors import safe_open
        with safe_open(self.folder / file, framework="pt") as tensors:
            reference = tensors.get_tensor(saved["tensor"])
        assert list(output.shape) == saved["shape"], f"shape {list(output.shape)} instead of {saved['shape']}"
        output = output if saved["stride"] == 1 else output.flatten()[::saved["stride"]]
        return float((output - reference).abs().max()) / saved["std"]


@pytest.fixture(params=[family.name for family in FAMILIES.values() if family.released])
def released(request) -> str:
    """A family that the reference implementation has, and so the goldens."""
    return request.param


@pytest.fixture(scope="session")
def goldens() -> Goldens:
    return Goldens(GOLDENS)
