"""What nodes show on themselves after a run, with ComfyUI's own previews."""

import logging

import torch
from comfy_api.latest import ui
from server import PromptServer

from .chart import draw_chart
from .runtime.strength_over_time import STEPS, StrengthOverTime


def show_text(cls, text: str) -> ui.PreviewText:
    """Tell the user: in the log, on the node in the open page, and in the prompt's history."""
    logging.info("ControlNeXt: %s", text)
    send_text(cls, text)
    return ui.PreviewText(text)


def send_text(cls, text: str) -> None:
    """Show a text on the node in the page that queued it, in place of the one before."""
    if cls.hidden is None:  # outside a prompt
        return
    server = PromptServer.instance
    if server.client_id is not None:  # for None, ComfyUI would tell every page
        server.send_progress_text(text, cls.hidden.unique_id, server.client_id)


def show_strength(strength: float, start_percent: float, end_percent: float,
                  over_time: StrengthOverTime | None) -> ui.PreviewImage:
    """A chart of when and how strongly control acts, as a picture on the node."""
    factors = [1.0] * (STEPS + 1) if over_time is None else over_time.factors
    strengths = [strength * factor if start_percent <= step / STEPS <= end_percent else 0.0
                 for step, factor in enumerate(factors)]
    return ui.PreviewImage(torch.from_numpy(draw_chart(strengths))[None].float() / 255)
