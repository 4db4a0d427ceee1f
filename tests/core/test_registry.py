"""What the ComfyUI registry and comfy-test check of the pack without running it, by their own tools, offline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CHECKED = {".py", ".toml", ".txt", ".js", ".mjs"}


def run(module: str, *arguments, folder: Path, home: Path) -> str:
    """What a command-line tool prints; it must exit with 0. It keeps its settings in `home` and reports nothing."""
    pytest.importorskip(module, reason=f"needs the Python package {module.replace('_', '-')}")
    homes = dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CONFIG_HOME"), str(home))
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, capture_output=True, encoding="utf-8",
                          env={**os.environ, **homes, "DO_NOT_TRACK": "1", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def unpublished() -> set[str]:
    """Names of files and folders that the registry does not get."""
    listed = [(REPOSITORY / name).read_text().split() for name in (".comfyignore", ".gitignore")]
    return {line.strip("/") for lines in listed for line in lines} | {".git"}


@pytest.fixture
def published(tmp_path) -> Path:
    """The texts of what the registry gets: all but what .comfyignore names."""
    left_out = unpublished()

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names
                if name in left_out or (Path(folder, name).is_file() and Path(name).suffix not in CHECKED)]
    return shutil.copytree(REPOSITORY, tmp_path / "ComfyUI-ControlNeXt", ignore=ignored)


def test_comfy_node_validate_passes_without_a_warning(tmp_path):
    output = run("comfy_cli", "--skip-prompt", "node", "validate", folder=REPOSITORY, home=tmp_path)
    assert "All validation checks passed" in output
    assert "warning" not in output.lower()


def test_the_static_levels_of_comfy_test_pass(published, tmp_path):
    output = run("comfy_test", "lint", "--strict", folder=published, home=tmp_path)
    assert "[SYNTAX] PASSED" in output and "[JAVASCRIPT] PASSED" in output


def test_what_the_registry_gets_stays_under_5_megabytes():
    left_out = unpublished()
    sizes = {}
    for folder, folders, files in os.walk(REPOSITORY):
        folders[:] = [name for name in folders if name not in left_out]
        sizes |= {path: path.stat().st_size for path in (Path(folder, name) for name in files if name not in left_out)}
    assert REPOSITORY / "nodes" / "apply.py" in sizes
    assert sum(sizes.values()) < 5_000_000
