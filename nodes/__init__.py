"""The ComfyUI face of ControlNeXt."""

from .apply import ControlNeXtApply
from .canny import ControlNeXtCanny
from .loader import ControlNeXtLoader
from .pose import POSE_NODES
from .save import ControlNeXtSave
from .save_lora import ControlNeXtSaveAsLoRA
from .to_controlnet import ControlNeXtToControlNet
from .train import ControlNeXtTrain
from .unet_loader import ControlNeXtUNetLoader

NODES = [
    ControlNeXtLoader, ControlNeXtApply, ControlNeXtToControlNet, ControlNeXtUNetLoader, ControlNeXtSaveAsLoRA,
    ControlNeXtCanny, *POSE_NODES, ControlNeXtTrain, ControlNeXtSave,
]
