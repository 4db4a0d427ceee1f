"""Which cases of a test older versions of ComfyUI run, too."""

from collections.abc import Collection, Iterable

import pytest


def on_older(cases: Iterable, chosen: Collection) -> list:
    """The cases as parameters, those that are chosen marked ``versions``."""
    return [pytest.param(case, marks=pytest.mark.versions if case in chosen else ()) for case in cases]
