"""ComfyUI's dynamic VRAM in a process without its server, begun as its main.py begins it."""

from __future__ import annotations


def before_torch() -> None:
    """Load the library, which must come before torch. In the Python that runs ComfyUI."""
    import comfy_aimdo.control
    comfy_aimdo.control.init(nvml_pressure=True)


def start() -> None:
    """Let all models that are made from now on be placed by it.

    Raises:
        RuntimeError: the library does not work here.
    """
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control
    if not comfy_aimdo.control.init_devices(one.index for one in comfy.model_management.get_all_torch_devices()):
        raise RuntimeError("comfy-aimdo does not work on this machine, so there is no dynamic VRAM to try.")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
