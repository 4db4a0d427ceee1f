"""Texts and the chart of control over time, which nodes show on themselves."""

import logging

from comfy_api.latest import ui

from .runtime.messages import send_text
from .runtime.settings import Settings
from .runtime.strength_over_time import STEPS, factors_over_time

CHARTED = 5  # every so many steps is a point of the chart


def show_text(cls, text: str) -> ui.PreviewText:
    """Tell the user: in the log, on the node in the open page, and in the prompt's history."""
    logging.info("ControlNeXt: %s", text)
    send_text(node_id(cls), text)
    return ui.PreviewText(text)


def node_id(cls) -> str | None:
    """The id of the node that runs, None outside a prompt."""
    return None if cls.hidden is None else cls.hidden.unique_id


def show_strength(settings: Settings) -> dict[str, list[float]]:
    """When and how strongly control acts, of which web/shown_on_nodes.js draws a chart: no picture for API clients."""
    factors = factors_over_time(settings.curve, settings.keyframes)
    strengths = [settings.strength * factor if settings.start_percent <= step / STEPS <= settings.end_percent else 0.0
                 for step, factor in enumerate(factors)]
    return {"strengths": [round(strength, 4) for strength in strengths[::CHARTED]]}
