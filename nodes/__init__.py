"""The ComfyUI face of ControlNeXt."""

from .apply import ControlNeXtApply
from .canny import ControlNeXtCanny
from .loader import ControlNeXtLoader

NODES = [ControlNeXtLoader, ControlNeXtApply, ControlNeXtCanny]
