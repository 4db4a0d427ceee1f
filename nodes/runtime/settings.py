"""Settings of a control, as the nodes write them down: a record that travels on a MODEL or a conditioning."""

from dataclasses import dataclass

import torch

from .loaded import ControlNeXt

SLOT = "controlnext"  # a list of a MODEL's patches, which ComfyUI hands on with it and looks through for models to load


@dataclass(frozen=True, eq=False)
class Settings:
    """A control as people ask for it. It knows no sigma, device or place: these are of the model that runs.

    Attributes:
        controlnext: the loaded model.
        image: (N, H, W, C) in [0, 1]; None where Apply ControlNet gives it later.
        mask: (M, H, W) in [0, 1] or None.
        strength: multiplies the family's gains.
        start_percent, end_percent: the part of the sampling in which control acts.
        curve: a CURVE of factors of the strength, or None.
        keyframes: HOOK_KEYFRAMES of factors of the strength, or None.
        inject_at: name of the place where control enters; auto is where the model was trained to enter.
        apply_to: auto, both or positive, the guidance halves that are controlled.
        window_reference: auto, on or off: the first image controls the first frame of every context window.
        resize: stretch, crop or pad, how an image becomes as large as the picture.
        fits_areas: for a cond with an area, an image that is not as large as the picture is fitted into the area, as
            ComfyUI's own ControlNets do; without it the area gets its part of the image.
        node_id: the id of the node that shows what is to be told about this control, or None.
    """

    controlnext: ControlNeXt
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    curve: object | None = None
    keyframes: object | None = None
    inject_at: str = "auto"
    apply_to: str = "auto"
    window_reference: str = "auto"
    resize: str = "stretch"
    fits_areas: bool = False
    node_id: str | None = None

    def models(self) -> list:
        """The ModelPatchers that ComfyUI loads with a MODEL that carries this among its patches."""
        return [self.controlnext.patcher]

    def __deepcopy__(self, memo) -> "Settings":
        return self  # nobody changes it, so copies of what it travels on share it, and with it weights and images


def settings_in(options: dict) -> list[Settings]:
    """The controls in a MODEL's transformer_options, in the order of the graph."""
    return options.get("patches", {}).get(SLOT, [])
