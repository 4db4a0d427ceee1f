"""Save ControlNeXt Model."""

import os

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..controlnext_core.families import FAMILIES
from ..controlnext_core.release_files import reference_files
from .preview import show_text
from .runtime.files import UNLISTED, unshared, write_whole
from .runtime.loaded import ControlNeXt, ControlNeXtType


class ControlNeXtSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtSave",
            display_name="Save ControlNeXt Model",
            category="ControlNeXt",
            description="Saves a ControlNeXt model in the authors' format: controlnet.safetensors, and "
                        "unet.safetensors if UNet weights were trained with it.",
            search_aliases=["controlnext", "save controlnet", "export controlnext"],
            inputs=[
                ControlNeXtType.Input("controlnext", tooltip="From Train ControlNeXt."),
                io.String.Input("filename_prefix", default="controlnext/ControlNeXt",
                                tooltip="Path inside the output folder: the start of a new folder's name. Move that "
                                        "folder to models/controlnext to load its files."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, controlnext: ControlNeXt, filename_prefix: str) -> io.NodeOutput:
        read = controlnext.loaded.checkpoint
        files = reference_files(read.state_dict, FAMILIES.get(controlnext.variant), read.scale,
                                controlnext.unet_differences, controlnext.place_name)
        output = folder_paths.get_output_directory()
        parent, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
        folder = os.path.join(parent, f"{name}_{counter:05}_")
        with write_whole(folder) as part:
            os.mkdir(part)
            for file, (tensors, metadata) in files.items():
                comfy.utils.save_torch_file(unshared(tensors), os.path.join(part, file + UNLISTED), metadata=metadata)
            for file in files:
                os.rename(os.path.join(part, file + UNLISTED), os.path.join(part, file))
        sizes = " and ".join(f"{file} ({len(tensors)} tensors)" for file, (tensors, _) in files.items())
        return io.NodeOutput(ui=show_text(cls, f"{os.path.relpath(folder, output)}: {sizes}"))
