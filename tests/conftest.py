"""Shared by every test: the core as a package of its own, and the goldens."""

import importlib.util
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def load_package(name: str, folder: Path):
    """Import a package by its path: with the repository on sys.path, its ``nodes`` would shadow ComfyUI's."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load_package("controlnext_core", REPO / "controlnext_core")
sys.path.append(str(REPO / "tests" / "goldens"))
from goldens import Goldens  # noqa: E402

from controlnext_core.families import FAMILIES  # noqa: E402


@pytest.fixture(params=[family.name for family in FAMILIES.values() if family.released])
def released(request) -> str:
    """A family that the reference implementation has, and so the goldens."""
    return request.param


@pytest.fixture(scope="session")
def goldens() -> Goldens:
    return Goldens()
