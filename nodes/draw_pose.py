"""ControlNeXt Draw Pose."""

import math

import torch
from comfy.model_management import get_free_memory, intermediate_device, throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..controlnext_core.pose_draw import COLORS, STICK_WIDTH, WIDEST_STICK, draw_pose
from ..controlnext_core.pose_keypoints import LARGEST_CANVAS, read_pixels, read_pose_keypoints
from .inputs import PoseKeypoint

EXPECTED_SIDE = f"0 to {LARGEST_CANVAS} pixels are expected: 0 takes that of the keypoints' canvas"


class ControlNeXtDrawPose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ControlNeXtDrawPose",
            display_name="ControlNeXt Draw Pose",
            category="ControlNeXt",
            description="Draws poses in the style that ControlNeXt's video models were trained on, one picture per "
                        "frame.",
            search_aliases=["pose", "keypoints", "openpose", "dwpose", "sdpose", "skeleton", "render pose"],
            inputs=[
                PoseKeypoint.Input(
                    "keypoints",
                    tooltip="Poses from ControlNeXt Align Pose, SDPose Keypoint Extractor or a DWPose node.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=LARGEST_CANVAS,
                    tooltip="Width of the pictures in pixels; 0 uses the canvas size of the keypoints.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=LARGEST_CANVAS,
                    tooltip="Height of the pictures in pixels; 0 uses the canvas size of the keypoints.",
                ),
                io.Boolean.Input("draw_body", default=True, advanced=True, tooltip="Draw trunk, limbs and head."),
                io.Boolean.Input("draw_hands", default=True, advanced=True, tooltip="Draw both hands."),
                io.Boolean.Input("draw_face", default=True, advanced=True, tooltip="Draw the 68 points of the face."),
                io.Combo.Input(
                    "colors",
                    options=list(COLORS),
                    default="controlnext",
                    tooltip=(
                        "controlnext: thin lines with red and blue swapped, for ControlNeXt's video models. openpose: "
                        "the usual OpenPose style, for other models."
                    ),
                ),
                io.Int.Input(
                    "stick_width",
                    default=STICK_WIDTH,
                    min=1,
                    max=WIDEST_STICK,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Thickness of limbs and joints; 4 is as in training. For xinsir's ControlNets use openpose "
                        "with 8 if the long side has 500 pixels or more, 12 if it has 1000 or more."
                    ),
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="One picture per frame, on black.")],
        )

    @classmethod
    def execute(
        cls,
        keypoints,
        width=0,
        height=0,
        draw_body=True,
        draw_hands=True,
        draw_face=True,
        colors="controlnext",
        stick_width=STICK_WIDTH,
    ) -> io.NodeOutput:
        width = read_pixels(width, "width", range(LARGEST_CANVAS + 1), EXPECTED_SIDE)
        height = read_pixels(height, "height", range(LARGEST_CANVAS + 1), EXPECTED_SIDE)
        frames = read_pose_keypoints(keypoints, "keypoints", canvas=(width, height) if width and height else None)
        width, height = width or frames[0].width, height or frames[0].height
        shape, device = (len(frames), height, width, 3), intermediate_device()
        if math.prod(shape) * torch.float32.itemsize > get_free_memory(device):
            raise ValueError(
                f"keypoints: {len(frames)} pictures of {width}x{height} pixels are more than memory holds: "
                "set a smaller width and height, or draw fewer frames at a time."
            )
        images = torch.empty(shape, device=device)
        progress = ProgressBar(len(frames))
        for image, frame in zip(images, frames, strict=True):
            throw_exception_if_processing_interrupted()
            picture = draw_pose(
                frame,
                width,
                height,
                colors=colors,
                draw_body=draw_body,
                draw_hands=draw_hands,
                draw_face=draw_face,
                stick_width=stick_width,
            )
            image.copy_(torch.from_numpy(picture)).div_(255)
            progress.update(1)
        return io.NodeOutput(images)
