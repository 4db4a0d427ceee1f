"""Texts and pictures that nodes show on themselves after a run, with ComfyUI's own previews."""

import logging

import torch
from comfy_api.latest import ui

from .chart import draw_chart
from .runtime.messages import send_text
from .runtime.settings import Settings
from .runtime.strength_over_time import STEPS, factors_over_time


def show_text(cls, text: str) -> ui.PreviewText:
    """Tell the user: in the log, on the node in the open page, and in the prompt's history."""
    logging.info("ControlNeXt: %s", text)
    send_text(node_id(cls), text)
    return ui.PreviewText(text)


def node_id(cls) -> str | None:
    """The id of the node that runs, None outside a prompt."""
    return None if cls.hidden is None else cls.hidden.unique_id


def show_strength(settings: Settings) -> ui.PreviewImage:
    """A chart of when and how strongly control acts, as a picture on the node."""
    factors = factors_over_time(settings.curve, settings.keyframes)
    strengths = [settings.strength * factor if settings.start_percent <= step / STEPS <= settings.end_percent else 0.0
                 for step, factor in enumerate(factors)]
    return ui.PreviewImage(torch.from_numpy(draw_chart(strengths))[None].float() / 255)
