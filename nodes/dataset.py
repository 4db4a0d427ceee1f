"""ControlNeXt Dataset."""

import os

import folder_paths
from comfy_api.latest import io

from ..controlnext_core.ranks import Ranks
from ..controlnext_core.sentences import quoted
from .inputs import DatasetType, checked_inputs
from .preview import show_text
from .training.dataset import CONTROLS, DataSettings, changes_of, encode, tell
from .training.settings import NONE

FOLDER = "controlnext_datasets"  # in the output folder


class ControlNeXtDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = folder_paths.get_input_subfolders()
        return io.Schema(
            node_id="ControlNeXtDataset",
            display_name="ControlNeXt Dataset",
            category="ControlNeXt",
            description="A folder with any number of pictures and captions, to train a ControlNeXt on. Pictures are "
                        "encoded once and read from disk when the training needs them.",
            search_aliases=["controlnext dataset", "training dataset", "dataset from folder", "load training images"],
            inputs=[
                io.Combo.Input("folder", options=folders,
                               tooltip="The folder with the pictures, inside ComfyUI's input folder. The caption of "
                                       "a picture is the text of the .txt file of the same name. In a subfolder "
                                       "called 10_name each picture counts ten times."),
                io.Vae.Input("vae", tooltip="The MODEL's VAE."),
                io.Clip.Input("clip", tooltip="The MODEL's CLIP."),
                io.Int.Input("size", default=DataSettings.size, min=64, max=4096, step=16,
                             tooltip="Each picture is resized to about as many pixels as a square of this side has: "
                                     "512 for SD1.5, 1024 for SDXL and later models."),
                io.Boolean.Input("buckets", default=DataSettings.buckets,
                                 tooltip="Keeps the shape of each picture and cuts it only a little, so that there "
                                         "are few different sizes. If off, all pictures are cut to squares."),
                io.Combo.Input("control", options=list(CONTROLS), default=DataSettings.control,
                               tooltip="The control image to make from each picture if control_folder is none. "
                                       "canny: its edges. mask: white where it is at least mask_threshold bright. "
                                       "degraded picture: for super-resolution, a smaller, degraded copy, made anew "
                                       "each time."),
                io.Float.Input("mask_threshold", default=DataSettings.threshold, min=0.0, max=1.0, step=0.01,
                               tooltip="The mask is white where the picture is at least this bright."),
                io.Combo.Input("control_folder", options=[NONE, *folders], default=NONE, optional=True,
                               tooltip="A folder inside ComfyUI's input folder with a control image of the same name "
                                       "for each picture: depth, poses, anything you made."),
                io.Combo.Input("weights_folder", options=[NONE, *folders], default=NONE, optional=True, advanced=True,
                               tooltip="A folder with a gray picture of the same name for each picture. It says how "
                                       "much each part counts in the loss: hands white and the rest gray, for "
                                       "example."),
            ],
            outputs=[DatasetType.Output(display_name="dataset", tooltip="For Train ControlNeXt.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder=None, control_folder=NONE, weights_folder=NONE, **_) -> str:
        return changes_of(*(_path_of(name) for name in (folder, control_folder, weights_folder)))

    @classmethod
    def execute(cls, vae, clip, **values) -> io.NodeOutput:
        given = checked_inputs(cls, **values)
        for name in ("folder", "control_folder", "weights_folder"):
            path = _path_of(given.get(name))
            if path and not os.path.isdir(path):
                raise ValueError(f"{name}: {quoted(given[name])} is no folder in ComfyUI's input folder any more; put "
                                 "it back or choose another one.")
            given[name] = path
        given["threshold"] = given.pop("mask_threshold")

        name = values["folder"].replace("/", "_")
        cache = os.path.join(folder_paths.get_output_directory(), FOLDER, name)
        dataset, encoded, left_out = encode(DataSettings(**given), vae, clip, cache, Ranks())
        return io.NodeOutput(dataset, ui=show_text(cls, tell(dataset, encoded, left_out)))


def _path_of(name: str | None) -> str | None:
    """The path of a listed folder; None for none, or where the name comes over a link."""
    return None if name in (NONE, None) else os.path.join(folder_paths.get_input_directory(), name)
