"""ControlNeXt Align Pose."""

from comfy_api.latest import io

from ..controlnext_core.pose_align import align_pose
from ..controlnext_core.pose_keypoints import read_pose_keypoints, write_pose_keypoints
from .inputs import PoseKeypoint


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
                        "The pose of the picture to animate. Crop the picture to the video's size before you detect "
                        "it. The first person of the first frame is used."
                    ),
                ),
                io.Boolean.Input(
                    "prepend_reference",
                    default=True,
                    tooltip=(
                        "Inserts the reference pose as the first frame, as in the training of ControlNeXt's SVD "
                        "models. The result is one frame longer than the video."
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
