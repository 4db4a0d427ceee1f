"""Nodes of an older ControlNeXt pack that Apply ControlNeXt replaces in workflows that still hold them."""

from comfy_api.latest import io

# Its places (blocks, input_block_patch_after_skip) were for experiments; the default is what auto chooses. It brought
# its model itself, so Load ControlNeXt Model has to be connected by hand.
REPLACEMENTS = [
    io.NodeReplace(
        new_node_id="ControlNeXtApply",
        old_node_id="ControlNextSVDApply",
        old_widget_ids=["strength", "blocks", "input_block_patch_after_skip"],
        input_mapping=[
            {"new_id": "model", "old_id": "model"},
            {"new_id": "image", "old_id": "pose_images"},
            {"new_id": "strength", "old_id": "strength"},
            {"new_id": "start_percent", "set_value": 0.0},
            {"new_id": "end_percent", "set_value": 1.0},
        ],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    ),
]
