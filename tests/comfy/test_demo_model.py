"""The demonstration's trained model: its pictures follow their control, for drawings that no training saw."""

import numpy as np
import pytest

from demo_model.agreement import share_of_the_way
from demo_model.measure import Demonstration, agreements, psnr

SEED = 1
SOME = slice(None, None, 8)  # of the held-out drawings; benchmarks/control.py and super_resolution.py measure all


class Measured:
    """One kind of control, and what the model draws under it for some held-out drawings.

    Args:
        drawn: what is drawn already, so that both kinds share what needs no control.
    """

    def __init__(self, demonstration: Demonstration, kind: str, drawn: dict):
        self.demonstration, self.kind, self.drawn = demonstration, kind, drawn
        self.see = {"canny": demonstration.edges, "mask": demonstration.regions}[kind]
        self.controls = self.see(demonstration.images)
        self.others = np.roll(self.controls, 3, axis=0)
        self.ceiling = agreements(self.see(demonstration.ceiling()), self.controls, kind)

    def found(self, strength: float, another: bool, styled: bool) -> np.ndarray:
        """What is seen in the pictures with control at this strength, and without at 0."""
        case = (self.kind, strength, another, styled) if strength else styled
        if case not in self.drawn:
            controls = (self.others if another else self.controls) if strength else None
            model = self.demonstration.styled() if styled else None
            self.drawn[case] = self.demonstration.draw(SEED, self.kind, controls, strength, model)
        return self.see(self.drawn[case])

    def share(self, strength: float, another: bool = False, styled: bool = False) -> float:
        """How far control goes from what is drawn without it to the VAE's own picture of the drawing."""
        wanted = self.others if another else self.controls
        on = agreements(self.found(strength, another, styled), wanted, self.kind)
        off = agreements(self.found(0.0, another, styled), wanted, self.kind)
        return share_of_the_way(on, off, self.ceiling)


@pytest.fixture(scope="module")
def drawn() -> dict:
    return {}


@pytest.fixture(scope="module")
def sd15(demonstrate):
    """In half as many steps as the benchmarks."""
    return demonstrate(SOME, steps=6)


@pytest.fixture(scope="module", params=["canny", "mask"])
def measured(sd15, drawn, request) -> Measured:
    return Measured(sd15, request.param, drawn)


def test_pictures_go_most_of_the_way_from_no_control_to_the_vaes_own_picture(measured):
    assert measured.share(1.0) >= 0.65


def test_pictures_follow_another_drawings_control_where_that_is_given(measured):
    assert measured.share(1.0, another=True) >= 0.6


def test_less_strength_goes_less_far(measured):
    assert 0 < measured.share(0.5) < measured.share(1.0)


def test_control_holds_beside_a_style_lora(measured):
    assert measured.share(1.0, styled=True) >= 0.5


@pytest.fixture(scope="module")
def sd3(demonstrate):
    return demonstrate(SOME, base="sd3", steps=8)


def test_edges_go_most_of_the_way_on_the_sd3(sd3):
    assert Measured(sd3, "canny", {}).share(1.0) >= 0.55


def test_the_sd3_restores_edges_that_are_lost_at_a_quarter_of_the_size(sd3):
    small, wanted = sd3.smaller(sd3.images), sd3.edges(sd3.images)
    ceiling, off, on = (agreements(sd3.edges(pictures), wanted, "super_resolution")
                        for pictures in (sd3.ceiling(), sd3.larger(small), sd3.draw(SEED, "super_resolution", small)))
    share = share_of_the_way(on, off, ceiling)
    print(f"share {share:.3f}")
    assert share >= 0.55


def test_the_sd3_keeps_the_small_pictures_colours_from_its_enlargement_on(sd3):
    small = sd3.smaller(sd3.images)
    start = {"start": sd3.larger(small), "denoise": 0.1}
    pictures = {"VAE": sd3.ceiling(), "off": sd3.draw(SEED, **start),
                "on": sd3.draw(SEED, "super_resolution", small, **start)}
    kept = {name: psnr(sd3.smaller(one), small) for name, one in pictures.items()}
    print(kept)
    assert kept["on"] >= kept["VAE"] - 3
    assert kept["on"] > kept["off"] + 0.5
