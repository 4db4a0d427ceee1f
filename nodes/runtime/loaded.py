"""CONTROLNEXT: a loaded module that ComfyUI manages, shared by everything that loads the same file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import CallbacksMP
from comfy_api.latest import io

from ...controlnext_core.checkpoint import open_checkpoint
from ...controlnext_core.release_files import FAMILY_KEY, PLACE_KEY, with_scale
from .feature_cache import FeatureCache, limit_from_environment
from .files import find_file, fingerprint, read_weights

FOLDERS = ("controlnext", "controlnet")
ControlNeXtType = io.Custom("CONTROLNEXT")

_loaded: WeakValueDictionary = WeakValueDictionary()


class LoadedModule:
    """One module inside a ModelPatcher, with what its state dict says of it and what it has computed.

    ``features`` are kept from run to run, where ComfyUI puts models that it does not use; ``image_parts`` (what they go
    on from) while a sampling runs, where the module is.

    Args:
        state_dict: from a file or a training.
        reload: (function, arguments) that give this ModelPatcher again, for when ComfyUI needs a copy of its own.
        load_device: the device that it runs on, if not ComfyUI's own for models.
        metadata: what the file says of itself.
    """

    def __init__(self, state_dict: dict, name: str, reload: tuple, disable_dynamic: bool = False, load_device=None,
                 metadata: Mapping[str, str] | None = None):
        try:
            checkpoint = open_checkpoint(state_dict, name, operations=comfy.ops.manual_cast,
                                         device=comfy.model_management.unet_offload_device())
        except ValueError as error:
            raise ValueError(f"controlnext_name: {error}") from None
        patcher_class = (comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher)
        load_device = load_device or comfy.model_management.get_torch_device()
        self.patcher = patcher_class(checkpoint.module, load_device=load_device,
                                     offload_device=comfy.model_management.unet_offload_device())
        checkpoint.load_weights(assign=self.patcher.is_dynamic())
        self.patcher.cached_patcher_init = reload
        self.checkpoint, self.name, self.metadata = checkpoint, name, metadata or {}
        self._copies: dict[torch.device, LoadedModule] = {}
        limit = limit_from_environment()
        self.features = FeatureCache(limit, self.patcher.offload_device)
        self.image_parts = FeatureCache(limit // 2)
        self.patcher.add_callback_with_key(CallbacksMP.ON_DETACH, "controlnext",
                                           partial(_give_back, (self.features, self.image_parts)))

    def __deepcopy__(self, memo) -> "LoadedModule":
        return self  # copies of what it travels on share its weights, and what it has computed

    def on_device(self, device: torch.device | None) -> "LoadedModule":
        """The module for a thread of several that has this device; None is the only thread."""
        return self if device in (None, self.patcher.load_device) else self.copy_on(device)

    def copy_on(self, load_device: torch.device) -> "LoadedModule":
        """A copy that shares no layer, always the same one for a device."""
        if load_device not in self._copies:
            state_dict = with_scale(self.checkpoint.state_dict, self.checkpoint.scale)
            self._copies[load_device] = LoadedModule(state_dict, self.name, self.patcher.cached_patcher_init, True,
                                                     load_device)
        return self._copies[load_device]

    def end_run(self) -> None:
        """Give back what only a running sampling needs."""
        self.image_parts.clear()
        self.features.end_run()

    def free_device(self) -> None:
        """Give back what lies on the device."""
        for cache in (self.features, self.image_parts):
            cache.free_device()

    def image_parts_stay(self, images: int, pixels: int, stem_pool: bool, dtype: torch.dtype) -> bool:
        """Whether the image parts of so many images of so many pixels are kept while a sampling runs, for its steps."""
        module = self.patcher.model
        size = images * module.image_part_numbers(pixels, stem_pool) * dtype.itemsize
        return module.timed and size <= self.image_parts.limit

    def memory(self, images: int, pixels: int, positions: int, stem_pool: bool, dtype: torch.dtype,
               frames: int | None = None) -> tuple[int, int]:
        """Bytes beside the weights that a sampling needs: (while the module runs, from its first step to its last).

        Args:
            pixels: the number of each image's.
            positions: the number of those at which an image's features are added.
            frames: that have features, where several images share one; None for as many as images.
        """
        module = self.patcher.model
        staying = 2 * (frames or images) * module.out_channels * positions  # each one's, and all put together
        if self.image_parts_stay(images, pixels, stem_pool, dtype):
            staying += (images - 1) * module.image_part_numbers(pixels, stem_pool)
        return module.peak(pixels, stem_pool) * dtype.itemsize, staying * dtype.itemsize


def _give_back(caches: tuple[FeatureCache, ...], patcher, unpatch_all: bool) -> None:
    """ON_DETACH callback: ComfyUI wants the memory, unless it only exchanges one clone of the patcher for another."""
    if unpatch_all:
        for cache in caches:
            cache.free_device()


@dataclass(frozen=True)
class ControlNeXt:
    """The object on a CONTROLNEXT link: the shared module and the variant that the user chose for it.

    From a training also ``unet_differences``, {diffusers name: tensor} of the UNet weights that were trained with it,
    and ``place_name``, the place where it was trained to enter; from a file as its metadata says, None for nothing.
    """

    loaded: LoadedModule
    variant: str
    name: str
    unet_differences: Mapping[str, torch.Tensor] = field(default_factory=dict)
    place_name: str | None = None

    def __deepcopy__(self, memo) -> "ControlNeXt":
        return self

    @property
    def patcher(self):
        return self.loaded.patcher


def load_module(path: str, name: str, disable_dynamic: bool = False) -> LoadedModule:
    """Read a file anew."""
    state_dict, metadata = read_weights(path, name, "controlnext_name")
    return LoadedModule(state_dict, name, (load_patcher, (path, name)), disable_dynamic, metadata=metadata)


def load_patcher(path: str, name: str, disable_dynamic: bool = False):
    """The file's ModelPatcher, as ComfyUI asks for it when it needs a copy of its own."""
    return load_module(path, name, disable_dynamic).patcher


def load_controlnext(name: str, variant: str) -> ControlNeXt:
    """Load a file of models/controlnext or models/controlnet; one that is in use already is shared, not read again."""
    path = find_file(name, FOLDERS, "controlnext_name")
    key = fingerprint(path)
    loaded = _loaded.get(key)
    if loaded is None:
        loaded = _loaded[key] = load_module(path, name)
    loaded.checkpoint.check_variant(variant)
    if variant == "auto":
        variant = loaded.checkpoint.known_family(loaded.metadata.get(FAMILY_KEY))
    return ControlNeXt(loaded, variant, name, place_name=loaded.metadata.get(PLACE_KEY))


def trained_controlnext(state_dict: Mapping, family: str, name: str, unet_differences: Mapping,
                        place_name: str | None = None) -> ControlNeXt:
    """A CONTROLNEXT of weights that come from no file."""
    loaded = LoadedModule(dict(state_dict), name, (trained_patcher, (state_dict, name)))
    return ControlNeXt(loaded, family, name, unet_differences, place_name)


def trained_patcher(state_dict: Mapping, name: str, disable_dynamic: bool = False):
    """The ModelPatcher of trained weights again."""
    return LoadedModule(dict(state_dict), name, (trained_patcher, (state_dict, name)), disable_dynamic).patcher
