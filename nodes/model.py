"""CONTROLNEXT: a loaded module that ComfyUI manages, shared by everything that loads the same file."""

import os
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.ops
from comfy.patcher_extension import CallbacksMP
from comfy_api.latest import io

from ..controlnext_core import checkpoint
from .feature_cache import FeatureCache, limit_from_environment
from .files import find_file, read_state_dict

FOLDERS = ("controlnext", "controlnet")
ControlNeXtType = io.Custom("CONTROLNEXT")

_loaded: WeakValueDictionary = WeakValueDictionary()


class LoadedModule:
    """One file's module inside a ModelPatcher, with what the file says of it and what it has computed.

    ``features`` are kept from run to run, ``image_parts`` (what they go on from) while a sampling runs.
    """

    def __init__(self, path: str, name: str, disable_dynamic: bool = False):
        state_dict = read_state_dict(path, name, "controlnext_name")
        try:
            read = checkpoint.read(state_dict, name, operations=comfy.ops.manual_cast,
                                   device=comfy.model_management.unet_offload_device())
        except ValueError as error:
            raise ValueError(f"controlnext_name: {error}") from None
        patcher_class = (comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher)
        self.patcher = patcher_class(read.module, load_device=comfy.model_management.get_torch_device(),
                                     offload_device=comfy.model_management.unet_offload_device())
        read.module.load_state_dict(read.state_dict, assign=self.patcher.is_dynamic())
        self.patcher.cached_patcher_init = (load_patcher, (path, name))
        self.checkpoint = read
        limit = limit_from_environment()
        self.features, self.image_parts = FeatureCache(limit), FeatureCache(limit // 2)
        self.patcher.add_callback_with_key(CallbacksMP.ON_DETACH, "controlnext",
                                           partial(_give_back, (self.features, self.image_parts)))


def _give_back(caches: tuple[FeatureCache, ...], patcher, unpatch_all: bool) -> None:
    """ON_DETACH callback: ComfyUI wants the memory, unless it only exchanges one clone of the patcher for another."""
    if unpatch_all:
        for cache in caches:
            cache.clear()


@dataclass(frozen=True)
class ControlNeXt:
    """What travels on a CONTROLNEXT link: the shared module and the variant that the user chose for it."""

    loaded: LoadedModule
    variant: str
    name: str

    @property
    def patcher(self):
        return self.loaded.patcher


def load_patcher(path: str, name: str, disable_dynamic: bool = False):
    """The file's ModelPatcher alone, as ComfyUI asks for it when it needs a copy of its own."""
    return LoadedModule(path, name, disable_dynamic).patcher


def load_controlnext(name: str, variant: str) -> ControlNeXt:
    """Load a file of models/controlnext or models/controlnet; one that is in use already is shared, not read again."""
    path = find_file(name, FOLDERS, "controlnext_name")
    stat = os.stat(path)
    key = (path, stat.st_mtime_ns, stat.st_size)
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = _loaded[key] = LoadedModule(path, name)
    loaded.checkpoint.check_variant(variant)
    return ControlNeXt(loaded, variant, name)
