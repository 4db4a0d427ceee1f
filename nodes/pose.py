"""Poses for ControlNeXt's video models: aligned to the picture that is animated, and drawn as they were in training."""

import torch
from comfy.model_management import intermediate_device, throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..controlnext_core.pose_align import align_pose
from ..controlnext_core.pose_draw import COLORS, draw_pose
from ..controlnext_core.pose_keypoints import read_pose_keypoints, write_pose_keypoints

PoseKeypoint = io.Custom("POSE_KEYPOINT")


class ControlNeXtAlignPose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ControlNeXtAlignPose",
            display_name="ControlNeXt Align Pose",
            category="ControlNeXt",
            description=(
                "Moves and scales the poses of a video so that they fit the person in a reference picture, "
                "as ControlNeXt's video models expect."
            ),
            search_aliases=["pose", "keypoints", "align", "retarget", "rescale", "dwpose", "sdpose", "mimicmotion"],
            inputs=[
                PoseKeypoint.Input(
                    "keypoints",
                    tooltip="The poses of the driving video, from SDPose Keypoint Extractor or a DWPose node.",
                ),
                PoseKeypoint.Input(
                    "reference",
                    tooltip=(
                        "The pose of the picture to animate, detected after it was cropped to the video's size. "
                        "Its first frame counts, and there the first person."
                    ),
                ),
                io.Boolean.Input(
                    "prepend_reference",
                    default=True,
                    tooltip=(
                        "Put the reference pose before the first frame, as the ControlNeXt SVD models were trained. "
                        "The result is then one frame longer than the video."
                    ),
                ),
            ],
            outputs=[
                PoseKeypoint.Output("keypoints", tooltip="The aligned poses, in pixels of the reference's canvas."),
            ],
        )

    @classmethod
    def execute(cls, keypoints, reference, prepend_reference=True) -> io.NodeOutput:
        frames = read_pose_keypoints(keypoints, "keypoints")
        reference_frame = read_pose_keypoints(reference, "reference")[0]
        return io.NodeOutput(write_pose_keypoints(align_pose(frames, reference_frame, prepend_reference)))


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


POSE_NODES = [ControlNeXtAlignPose, ControlNeXtDrawPose]
