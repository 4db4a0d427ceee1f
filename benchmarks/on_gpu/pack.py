"""A folder with what a machine without a network lacks to run ComfyUI: ComfyUI itself and wheels, but no torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import environment

COMFYUI, WHEELS = "comfyui.tar.xz", "wheels"
LEFT_OUT = ("tests", "tests-unit", "blueprints", ".github", "__pycache__")  # of ComfyUI's tree
LIMIT = 64 * 2 ** 20  # bytes that travel, the repository's files included
AT_HOME = ("demo_model/weights",)  # of the repository: no part needs it
PYTHON = "3.12"
TRIED = "right_normal"  # the part
SYSTEMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
           "manylinux_2_12_x86_64", "manylinux2010_x86_64", "any")
# packages that ComfyUI imports at its start, or demo_model, and that a Python made for torch lacks; the first ones
# would bring torch
ALONE = ("torchsde", "trampoline", "comfy-aimdo", "spandrel", "resvg-py")
PURE = ("comfy-kitchen",)  # without its own kernels, which take 45 MB and no part
WITH_THEIRS = ("av", "alembic", "SQLAlchemy", "blake3", "simpleeval", "pydantic", "pydantic-settings")
# what is there: the Python that it is for, and the one that it is tried in
THERE = ("numpy", "einops", "safetensors", "opencv-python-headless", "transformers", "sentencepiece", "tokenizers",
         "pillow", "scipy", "aiohttp", "yarl", "pyyaml", "tqdm", "psutil", "requests", "filelock")


def pack(folder: Path) -> None:
    """Make the folder, print what it holds and what all that travels comes to, and try it.

    Raises:
        SystemExit: something cannot be had, or all of it is too much.
    """
    try:
        python, comfyui = environment.set_up()
    except environment.SetupError as error:
        sys.exit(f"Error: {error}")
    shutil.rmtree(folder / WHEELS, ignore_errors=True)
    (folder / WHEELS).mkdir(parents=True)
    download(python, comfyui, folder / WHEELS)
    print(f"Compressing ComfyUI {environment.COMFYUI_VERSION} ...", flush=True)
    compress(comfyui, folder / COMFYUI)

    tree = sum((environment.REPOSITORY / name).stat().st_size for name in travelling())
    own = {file.name: file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    for name, size in sorted(own.items(), key=lambda item: -item[1]):
        print(f"{size / 2 ** 20:7.2f} MB  {name}")
    print(f"{tree / 2 ** 20:7.2f} MB  the repository without {', '.join(AT_HOME)}")
    total = tree + sum(own.values())
    print(f"{total / 2 ** 20:7.2f} MB  in all, of {LIMIT // 2 ** 20}")
    if total > LIMIT:
        sys.exit("Error: FOLDER: that is more than may travel.")
    try_it(folder)


def download(python: Path, comfyui: Path, folder: Path) -> None:
    """Get the wheels, in the versions that ComfyUI asks for."""
    asked = {line.split("=")[0].split(">")[0].strip(): line.strip() for line in open(comfyui / "requirements.txt")}
    systems = [option for system in SYSTEMS for option in ("--platform", system)]
    of_python = ["--only-binary=:all:", "--python-version", PYTHON, "--dest", str(folder)]
    compiled = [*of_python, "--implementation", "cp", *systems]

    pure = [*of_python, "--implementation", "py", "--platform", "any"]
    for names, options in ((ALONE, [*compiled, "--no-deps"]), (PURE, [*pure, "--no-deps"]), (WITH_THEIRS, compiled)):
        wanted = [asked.get(name, name) for name in names]
        print(f"Getting {' '.join(wanted)} ...", flush=True)
        got = subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "download", "-qq", *options, *wanted])
        if got.returncode:
            sys.exit("Error: pip could not get the wheels; its message is above.")


def compress(comfyui: Path, file: Path) -> None:
    """Write ComfyUI's tree without its tests."""
    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if set(Path(member.name).parts) & set(LEFT_OUT) else member
    with tarfile.open(file, "w:xz") as archive:
        archive.add(comfyui, "ComfyUI", filter=wanted)


def travelling() -> list[str]:
    """The repository's files that travel."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True,
                            cwd=environment.REPOSITORY, capture_output=True, text=True).stdout.split("\0")
    return [name for name in listed if name and not name.startswith(AT_HOME)
            and (environment.REPOSITORY / name).is_file()]


def try_it(folder: Path) -> None:
    """Let ComfyUI draw from the folder and the files that travel alone, in a Python that has what is there and torch.

    Raises:
        SystemExit: it does not.
    """
    found = shutil.which(f"python{PYTHON}")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        print(f"Not tried: there is no python{PYTHON} on PATH.")
        return
    python = bare_python(found)
    with tempfile.TemporaryDirectory() as scratch:
        tree, out = Path(scratch) / "repository", Path(scratch) / "out"
        for name in travelling():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(environment.REPOSITORY / name, tree / name)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("COMFYUI_", "CONTROL"))}
        command = [python, tree / "benchmarks" / "gpu.py", TRIED, "--small", "--packed", folder, "--out", out]
        said = subprocess.run(command, env={**variables, "CONTROLNEXT_CACHE": scratch}, capture_output=True, text=True)
        if f'"part": "{TRIED}", "state": "done"' not in (out / "gpu.jsonl").read_text():
            sys.exit(f"Error: FOLDER: ComfyUI does not draw from it: {said.stdout}{said.stderr}")
    print(f"Tried in Python {PYTHON}: ComfyUI starts from it and draws under control.")


def bare_python(found: str) -> Path:
    """An environment of that Python with what is there, torch among it; kept for the next time."""
    venv = environment.cache_folder() / f"venv-bare-{PYTHON}"
    python = venv / "bin" / "python"
    if not (venv / "complete").is_file():
        print(f"Making {venv} (some gigabytes, some minutes) ...", flush=True)
        subprocess.run([found, "-m", "venv", "--clear", venv], check=True)
        environment.pip_install(python, *THERE, *environment.CPU_PINS)
        environment.pip_install(python, "--no-deps", environment.CPU_TORCHAUDIO)
        environment.repair_torch_packages(python)
        (venv / "complete").touch()
    return python


def unpacked(folder: Path) -> dict[str, str]:
    """Variables with which a process runs ComfyUI and finds the packages, once they are unpacked into the cache folder.

    Raises:
        environment.SetupError: the folder is not one that ``pack`` made.
    """
    if not (folder / COMFYUI).is_file():
        raise environment.SetupError(f"--packed is {folder}, which holds no {COMFYUI}; make it with --pack.")
    held = sorted((file.name, file.stat().st_size) for file in folder.rglob("*"))
    site = environment.cache_folder() / f"packed-{hashlib.sha256(repr(held).encode()).hexdigest()[:12]}"
    if not (site / "ComfyUI").is_dir():
        partial = site.with_name(f"{site.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for wheel in sorted((folder / WHEELS).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial / "packages")
        with tarfile.open(folder / COMFYUI) as archive:
            archive.extractall(partial, filter="data")
        partial.rename(site)
    return {"COMFYUI_PATH": str(site / "ComfyUI"), "COMFYUI_PYTHON": sys.executable,
            "PYTHONPATH": str(site / "packages")}
