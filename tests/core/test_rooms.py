"""The rooms of the product: who imports whom, read from the code, and what a room's names and comparisons may be."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from controlnext_core.bases import BASES
from controlnext_core.families import FAMILIES

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ROOMS = ["controlnext_core", "nodes/runtime", "nodes/training", "nodes"]  # each may import itself and those before it
COMFYUI = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server"}


def files_of(room: str) -> list[Path]:
    return sorted((REPOSITORY / room).glob("*.py"))


def imported(file: Path) -> list[Path]:
    """What a file imports, functions' own imports too: of the repository as paths without ending, else as bare names.

    Of ``from a import b`` it is a.b, for b may be a module.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Path(*alias.name.split(".")) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1].relative_to(REPOSITORY) if node.level else Path()
            module = start.joinpath(*(node.module or "").split("."))
            found += [module / alias.name for alias in node.names]
    return found


def room_of(path: Path) -> str | None:
    """The innermost room that something imported lies in, None for what is not the product's."""
    return next((room for room in sorted(ROOMS, key=len, reverse=True) if path.is_relative_to(room)), None)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    allowed = {None, *ROOMS[:ROOMS.index(room) + 1]}
    back = [(file.name, str(path)) for file in files_of(room) for path in imported(file)
            if room_of(path) not in allowed]
    assert files_of(room) and back == []


def test_the_method_knows_no_comfyui():
    known = [(file.name, str(path)) for file in files_of("controlnext_core") for path in imported(file)
             if path.parts[0] in COMFYUI]
    assert known == []


def test_no_two_functions_of_the_method_share_a_name():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files_of("controlnext_core")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_code_compares_names_of_bases_or_families(room):
    """What differs between them stands in their rows."""
    names = {*BASES, *FAMILIES}
    compared = []
    for file in files_of(room):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Compare, ast.Match)):
                constants = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]
                compared += [(file.name, node.lineno, constant) for constant in constants if constant in names]
    assert compared == []
