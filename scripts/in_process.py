"""ComfyUI in this process, without a server: its modules, its own nodes and the pack's."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import environment


def load_comfyui(comfyui: Path, *options: str) -> None:
    """Make ComfyUI's modules ones that this process can import, with these options of its command line."""
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", *options]
    import comfy.options
    comfy.options.enable_args_parsing()


def start_comfyui(comfyui: Path, base: Path, *options: str) -> None:
    """The same for what computes here, with the base directory `base`, on the GPU or, without one, on the CPU."""
    import torch
    device = [] if torch.cuda.is_available() else ["--cpu"]
    # PyTorch's attention is ComfyUI's default on a GPU; its default on a CPU would slow the UNet and flatter control
    load_comfyui(comfyui, "--base-directory", str(environment.base_directory(base)), "--use-pytorch-cross-attention",
                 *device, *options)


class Pack:
    """The pack as the started ComfyUI's own loader loads it from the folder of custom nodes, beside ComfyUI's nodes."""

    def __init__(self):
        import folder_paths
        import utils.extra_config  # noqa: F401

        import nodes  # after utils, as in main.py: it puts comfy/, with another utils, first
        folder = Path(folder_paths.get_folder_paths("custom_nodes")[0]) / "ComfyUI-ControlNeXt"
        assert asyncio.run(nodes.load_custom_node(str(folder))), "ComfyUI could not load the pack"
        self._nodes = nodes.NODE_CLASS_MAPPINGS
        self.models = Path(folder_paths.models_dir)

    def module(self, name: str):
        """A module of the pack, such as ``nodes.runtime.injection``."""
        root = self._nodes["ControlNeXtApply"].__module__.rsplit(".nodes.", 1)[0]
        return sys.modules[f"{root}.{name}"]

    def run(self, node: str, **inputs):
        """The output of a node, or all of them where it has several."""
        import torch
        cls = self._nodes[node]
        with torch.inference_mode():
            outputs = getattr(cls if hasattr(cls, "GET_SCHEMA") else cls(), cls.FUNCTION)(**inputs)
        outputs = getattr(outputs, "result", outputs)
        return outputs[0] if len(outputs or ()) == 1 else outputs
