"""ControlNeXt Draw Pose."""

import torch
from comfy.model_management import intermediate_device, throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..controlnext_core.pose_draw import COLORS, draw_pose
from ..controlnext_core.pose_keypoints import read_pose_keypoints
from .inputs import PoseKeypoint


class ControlNeXtDrawPose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ControlNeXtDrawPose",
            display_name="ControlNeXt Draw Pose",
            category="ControlNeXt",
            description="Draws poses as the pictures that ControlNeXt's video models were trained on, one per frame.",
            search_aliases=["pose", "keypoints", "openpose", "dwpose", "sdpose", "skeleton", "render pose"],
            inputs=[
                PoseKeypoint.Input(
                    "keypoints",
                    tooltip="Poses from ControlNeXt Align Pose, SDPose Keypoint Extractor or a DWPose node.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=16384, tooltip="Width of the pictures; 0: the keypoints' canvas."
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=16384, tooltip="Height of the pictures; 0: the keypoints' canvas."
                ),
                io.Boolean.Input("draw_body", default=True, advanced=True, tooltip="Draw trunk, limbs and head."),
                io.Boolean.Input("draw_hands", default=True, advanced=True, tooltip="Draw both hands."),
                io.Boolean.Input("draw_face", default=True, advanced=True, tooltip="Draw the 68 points of the face."),
                io.Combo.Input(
                    "colors",
                    options=list(COLORS),
                    default="controlnext",
                    tooltip=(
                        "controlnext: thin lines and red and blue swapped, which ControlNeXt's video models know. "
                        "openpose: the usual OpenPose look, for other models."
                    ),
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="One picture per frame, on black.")],
        )

    @classmethod
    def execute(
        cls, keypoints, width=0, height=0, draw_body=True, draw_hands=True, draw_face=True, colors="controlnext"
    ) -> io.NodeOutput:
        frames = read_pose_keypoints(keypoints, "keypoints", canvas=(width, height) if width and height else None)
        width, height = width or frames[0].width, height or frames[0].height
        images = torch.empty((len(frames), height, width, 3), device=intermediate_device())
        progress = ProgressBar(len(frames))
        for image, frame in zip(images, frames, strict=True):
            throw_exception_if_processing_interrupted()
            picture = draw_pose(frame, width, height, colors, draw_body, draw_hands, draw_face)
            image.copy_(torch.from_numpy(picture)).div_(255)
            progress.update(1)
        return io.NodeOutput(images)
