"""Who imports whom beside the product, functions' own imports too, and what tests may reach for."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def imported(file: Path) -> set[str]:
    """The modules that a file names in its imports; of `from a import b` both a and a.b, for b may be one."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("folder", ["demo_model", "benchmarks", "scripts"])
def test_no_files_import_each_other_in_a_circle(folder):
    files = {file.stem: imported(file) for file in (REPOSITORY / folder).glob("*.py")}

    def needed_by(file: str) -> list[str]:
        return [other for other in files if {other, f"{folder}.{other}"} & files[file]]

    TopologicalSorter({file: needed_by(file) for file in files}).prepare()  # raises CycleError, which names the circle


def private_names(file: Path) -> set[str]:
    """Names with one underscore before them that a test imports, or takes of something else than its own self."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)
              and ast.unparse(node.value) not in ("self", "super()", "os", "torch")}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_tests_reach_for_no_private_names_of_the_pack():
    found = {str(file): private_names(file) for file in (REPOSITORY / "tests").rglob("*.py")}
    assert {file: names for file, names in found.items() if names} == {}
