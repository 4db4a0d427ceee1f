"""ComfyUI-ControlNeXt: ControlNeXt (arXiv 2408.06070) as native ComfyUI nodes."""

import os

import folder_paths
from comfy_api.latest import ComfyAPI, ComfyExtension, io
from server import PromptServer

from .nodes import NODES
from .nodes.replacements import REPLACEMENTS

WEB_DIRECTORY = "./web"


def register_model_folder() -> None:
    """Add models/controlnext beside any folders of that kind that extra_model_paths.yaml brought."""
    folder_paths.add_model_folder_path("controlnext", os.path.join(folder_paths.models_dir, "controlnext"))
    paths, _ = folder_paths.folder_names_and_paths["controlnext"]
    # a new kind lists every file; this one lists weights
    folder_paths.folder_names_and_paths["controlnext"] = (paths, folder_paths.supported_pt_extensions)


register_model_folder()


class ControlNeXtExtension(ComfyExtension):
    async def on_load(self) -> None:
        if not hasattr(PromptServer, "instance"):
            return  # ComfyUI as a library: no workflow files to open
        for replacement in REPLACEMENTS:
            await ComfyAPI().node_replacement.register(replacement)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ControlNeXtExtension:
    return ControlNeXtExtension()
