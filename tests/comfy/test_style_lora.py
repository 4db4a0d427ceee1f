"""The style LoRA of demo_model/style_lora.py, which ComfyUI's own training node made, in the stock LoRA loader."""

import numpy as np
import pytest
from safetensors.torch import load_file

from demo_model import provide
from demo_model.measure import Demonstration
from demo_model.style_lora import INK, PAPER


@pytest.fixture(scope="module")
def demonstration(demonstrate) -> Demonstration:
    return demonstrate(slice(4))


def test_every_key_of_the_lora_is_taken(demonstration, caplog):
    patched = set(demonstration.styled().patches)
    assert "not loaded" not in caplog.text.lower()
    layers = [name.rsplit(".", 1) for name in load_file(provide.source(provide.LORA)) if "lora_down" not in name]
    weights = {f"{layer.removesuffix('.lora_up')}.weight" for layer, kind in layers if kind in ("weight", "diff")}
    assert patched == weights | {f"{layer}.bias" for layer, kind in layers if kind == "diff_b"}


def colours_beside_the_ink(pictures: np.ndarray) -> float:
    """Mean distance, of 255, of an IMAGE's pixels from the mixtures of INK and PAPER."""
    towards = np.subtract(INK, PAPER) / np.linalg.norm(np.subtract(INK, PAPER))
    from_paper = pictures * 255 - PAPER
    return float(np.linalg.norm(from_paper - (from_paper @ towards)[..., None] * towards, axis=-1).mean())


def test_pictures_of_held_out_drawings_are_in_the_styles_ink(demonstration):
    plain, styled = (colours_beside_the_ink(demonstration.draw(seed=1, model=model).numpy())
                     for model in (None, demonstration.styled()))
    assert styled < plain / 3
