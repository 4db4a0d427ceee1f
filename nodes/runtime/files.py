"""Finding, reading and writing weight files, with one sentence for everything that can go wrong with one."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.utils
import folder_paths
from safetensors import SafetensorError, safe_open

UNLISTED = ".part"  # an ending that no list of files has


def list_files(kinds: tuple[str, ...]) -> list[str]:
    """Names of the weight files of several model folders, each name once."""
    return sorted({name for kind in kinds for name in folder_paths.get_filename_list(kind)}, key=str.lower)


def find_file(name: str, kinds: tuple[str, ...], input_name: str) -> str:
    """Full path of a listed file; the first folder that has it wins. FileNotFoundError names input and folders."""
    for kind in kinds:
        path = folder_paths.get_full_path(kind, name)
        if path is not None:
            return path
    folders = " or ".join(f"models/{kind}" for kind in kinds)
    raise FileNotFoundError(f"{input_name}: {name} was not found in {folders}; put the file there and press R to "
                            f"refresh.")


def fingerprint(*paths: str) -> str:
    """Another text when a file is exchanged. A digest, since ComfyUI writes it into the pictures' metadata."""
    stats = [(path, os.stat(path)) for path in paths]
    return hashlib.sha256(repr([(path, stat.st_mtime_ns, stat.st_size) for path, stat in stats]).encode()).hexdigest()


def fingerprint_listed(name: str | None, kinds: tuple[str, ...], input_name: str) -> str:
    """The ``fingerprint`` of a listed file; of all for None, as ComfyUI calls beforehand what comes over a link."""
    names = list_files(kinds) if name is None else [name]
    return fingerprint(*(find_file(name, kinds, input_name) for name in names))


def read_state_dict(path: str, name: str, input_name: str) -> dict:
    """{key: tensor} of a .safetensors, .bin or .pt file; pickles are read with weights only.

    Raises:
        ValueError: an empty, damaged or truncated file, or a pickle that holds more than weights (it is not run).
    """
    if os.path.getsize(path) == 0:
        raise ValueError(f"{input_name}: {name} is empty (0 bytes); download it again.")
    try:
        state_dict = comfy.utils.load_torch_file(path, safe_load=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{input_name}: {name} is damaged or holds more than weights, so it was not opened; download "
                         f"it again, as .safetensors if you can.") from error
    except Exception as error:
        raise ValueError(f"{input_name}: {name} cannot be read ({type(error).__name__}), it is damaged or incomplete; "
                         f"download it again.") from error
    if not isinstance(state_dict, dict):
        raise ValueError(f"{input_name}: {name} holds a {type(state_dict).__name__} where named weights are expected; "
                         f"choose another file.")
    return state_dict


def read_metadata(path: str) -> dict[str, str]:
    """What a .safetensors file that can be read says of itself; nothing for other files."""
    if not path.endswith(".safetensors"):
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def load_state_dict(name: str, kinds: tuple[str, ...], input_name: str) -> dict:
    """``find_file`` and ``read_state_dict`` in one."""
    return read_state_dict(find_file(name, kinds, input_name), name, input_name)


@contextmanager
def write_whole(path: str) -> Iterator[str]:
    """Where to write a file, or a folder of files, that becomes ``path`` once the block has ended.

    That place has no ending that is listed, in a folder of its own beside ``path``. Whatever ends the block early, that
    folder goes; only a process that is killed leaves it there, as ``path``, some letters and ``.part``.

    Raises:
        ValueError: the disk is full or refuses, in one sentence; what was there before is there still.
    """
    folder, name = os.path.split(path)
    try:
        with tempfile.TemporaryDirectory(UNLISTED, f"{name}.", folder) as part:
            yield os.path.join(part, "unfinished")
            os.replace(os.path.join(part, "unfinished"), path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save says something of its own when the disk fails it
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, (OSError, SafetensorError)):
            raise
        reason = getattr(reason, "strerror", reason)
        raise ValueError(f"filename_prefix: {name} could not be written ({reason}), and what was there before is "
                         "unchanged; make room on the disk or choose another folder.") from error
