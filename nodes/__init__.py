"""The ComfyUI face of ControlNeXt."""

from .align_pose import ControlNeXtAlignPose
from .apply import ControlNeXtApply
from .canny import ControlNeXtCanny
from .dataset import ControlNeXtDataset
from .draw_pose import ControlNeXtDrawPose
from .loader import ControlNeXtLoader
from .save import ControlNeXtSave
from .save_as_lora import ControlNeXtSaveAsLoRA
from .to_controlnet import ControlNeXtToControlNet
from .train import ControlNeXtTrain
from .unet_loader import ControlNeXtUNetLoader

NODES = [
    ControlNeXtLoader, ControlNeXtApply, ControlNeXtToControlNet, ControlNeXtUNetLoader, ControlNeXtSaveAsLoRA,
    ControlNeXtCanny, ControlNeXtAlignPose, ControlNeXtDrawPose, ControlNeXtDataset, ControlNeXtTrain,
    ControlNeXtSave,
]
