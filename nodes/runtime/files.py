"""Finding, reading and writing weight files, with one sentence for everything that can go wrong with one."""

import hashlib
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError

from ...controlnext_core.sentences import quoted

UNLISTED = ".part"  # an ending that no list of files has


def list_files(kinds: tuple[str, ...]) -> list[str]:
    """Names of the weight files of several model folders, each name once."""
    return sorted({name for kind in kinds for name in folder_paths.get_filename_list(kind)}, key=str.lower)


def _path_of(name: str, kinds: tuple[str, ...]) -> str | None:
    """Full path of a listed file; the first folder that has it wins. None: it is in none, or no file at all."""
    return next(filter(None, (folder_paths.get_full_path(kind, name) for kind in kinds)), None)


def find_file(name: str, kinds: tuple[str, ...], input_name: str) -> str:
    """Full path of a listed file. FileNotFoundError names input and folders."""
    path = _path_of(name, kinds)
    if path is None:
        folders = " or ".join(f"models/{kind}" for kind in kinds)
        raise FileNotFoundError(f"{input_name}: {quoted(name)} was not found in {folders}; put the file there and "
                                f"press R to refresh.")
    return path


def fingerprint(*paths: str) -> str:
    """Another text when a file is exchanged. A digest, since ComfyUI writes it into the pictures' metadata."""
    stats = [(path, os.stat(path)) for path in paths]
    return hashlib.sha256(repr([(path, stat.st_mtime_ns, stat.st_size) for path, stat in stats]).encode()).hexdigest()


def fingerprint_listed(name: str | None, kinds: tuple[str, ...], input_name: str) -> str:
    """The ``fingerprint`` of a listed file; of all for None, as ComfyUI calls beforehand what comes over a link.

    ComfyUI lists what is no file too, a link that leads nowhere for one: among all it counts for nothing.
    """
    if name is not None:
        return fingerprint(find_file(name, kinds, input_name))
    return fingerprint(*filter(None, (_path_of(listed, kinds) for listed in list_files(kinds))))


def read_weights(path: str, name: str, input_name: str) -> tuple[dict, dict[str, str]]:
    """({key: tensor}, metadata) of a .safetensors, .sft, .bin or .pt file; pickles, read with weights only, have none.

    Raises:
        ValueError: an empty, damaged, truncated or locked file, or a pickle that holds more than weights (it is not
            run).
    """
    name = quoted(name)
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise ValueError(f"{input_name}: {name} cannot be opened ({error.strerror}); give ComfyUI the right to read "
                         f"it.") from error
    if empty:
        raise ValueError(f"{input_name}: {name} is empty (0 bytes); download it again.")
    try:
        state_dict, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{input_name}: {name} is damaged or holds more than weights, so it was not opened; download "
                         f"it again, as .safetensors if you can.") from error
    except Exception as error:
        raise ValueError(f"{input_name}: {name} cannot be read ({type(error).__name__}), it is damaged or incomplete; "
                         f"download it again.") from error
    if not isinstance(state_dict, dict):
        raise ValueError(f"{input_name}: {name} holds a {type(state_dict).__name__} where named weights are expected; "
                         f"choose another file.")
    return state_dict, metadata or {}


def unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as a .safetensors file takes them: on the host, contiguous, none in the memory of another."""
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    owners = Counter(value.untyped_storage().data_ptr() for value in tensors.values())
    return {key: value.clone() if owners[value.untyped_storage().data_ptr()] > 1 else value
            for key, value in tensors.items()}


@contextmanager
def write_whole(path: str, input_name: str = "filename_prefix") -> Iterator[str]:
    """A place to write a file, or a folder of files, that becomes ``path`` once the block has ended.

    It has no ending that is listed, in a folder of its own beside ``path``. Whatever ends the block early, that
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
        raise ValueError(f"{input_name}: {quoted(name)} could not be written ({reason}), and what was there before "
                         "is unchanged; make room on the disk or choose another folder.") from error
