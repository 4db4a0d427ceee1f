"""The ComfyUI face of ControlNeXt."""

from .apply import ControlNeXtApply
from .canny import ControlNeXtCanny
from .loader import ControlNeXtLoader
from .pose import POSE_NODES

NODES = [ControlNeXtLoader, ControlNeXtApply, ControlNeXtCanny, *POSE_NODES]
