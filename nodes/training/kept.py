"""Kept trainings: the files in the output folder that a training leaves behind and goes on from."""

import os

import folder_paths
import torch

from ...controlnext_core.families import families_of
from ...controlnext_core.layouts import layout_of
from ...controlnext_core.sentences import quoted
from ...controlnext_core.training import faulty_entry
from ..runtime.files import write_whole
from ..runtime.places import PLACES

FOLDER = "controlnext_training"  # in the output folder
ENDING = ".pt"
LARGEST_SCALE = torch.finfo(torch.float32).max


def list_kept() -> list[str]:
    """Names of the kept trainings below their folder; links that lead nowhere, pipes and the like are none."""
    found = (os.path.join(folder, file) for folder, _, files in os.walk(kept_folder()) for file in files)
    return sorted(name_of(path) for path in found if path.endswith(ENDING) and os.path.isfile(path))


def kept_folder() -> str:
    return os.path.join(folder_paths.get_output_directory(), FOLDER)


def path_of(name: str) -> str:
    return os.path.join(kept_folder(), name)


def name_of(path: str) -> str:
    """The name that ``list_kept`` has for a path."""
    return os.path.relpath(path, kept_folder())


def free_path(filename_prefix: str) -> str:
    """How paths of a new training begin, as none does yet. ValueError: nothing can be written there."""
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, kept_folder())
    except Exception as error:  # ComfyUI has no class of its own for a folder outside
        raise ValueError(f"filename_prefix: {quoted(filename_prefix)} names no place below output/{FOLDER} that can be "
                         f"written to ({type(error).__name__}); choose a plain name.") from error
    return os.path.join(folder, f"{name}_{counter:05}")


def write_kept(path: str, state: dict) -> None:
    """Write ``Session.state``, which ``read_kept`` reads. ValueError: the disk refuses."""
    with write_whole(path) as part, open(part, "wb") as file:
        torch.save(state, file)


def read_kept(name: str) -> dict:
    """The state that ``write_kept`` wrote, found whole; one of an older version has no ``place``.

    Args:
        name: a listed one.

    Raises:
        ValueError: it is something else, or damaged.
    """
    try:
        state = torch.load(path_of(name), "cpu", weights_only=True)
    except Exception as error:  # whatever a file's bytes make of torch's reader
        raise _not_kept(name, type(error).__name__) from error
    faulty = _faulty_entry(state) if isinstance(state, dict) else type(state).__name__
    if faulty:
        raise _not_kept(name, faulty)
    return state


def _faulty_entry(state: dict) -> str | None:
    """The first entry that is missing or not as ``write_kept`` writes it, None where all are whole."""
    if faulty := faulty_entry(state):
        return faulty
    if state.get("family") not in [family.name for family in families_of(layout_of(list(state["module"])))]:
        return "family"
    if not isinstance(state.get("scale"), float) or not abs(state["scale"]) <= LARGEST_SCALE:
        return "scale"
    return None if state.get("place") in (None, *PLACES) else "place"


def _not_kept(name: str, what: str) -> ValueError:
    return ValueError(f"resume_from: {quoted(name)} is not a saved training of Train ControlNeXt, or it is damaged "
                      f"({quoted(what)}); choose another one or none.")
