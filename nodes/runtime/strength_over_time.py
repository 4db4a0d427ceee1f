"""How strongly control acts at each moment of a sampling: percents, ComfyUI's curves and hook keyframes."""

import torch
from comfy.hooks import HookKeyframe, HookKeyframeGroup

try:
    from comfy_api.input import CurveInput
except ImportError:  # ComfyUI before its Curve Editor
    CurveInput = None

STEPS = 1000  # parts of a sampling, as fine as start_percent


class StrengthOverTime:
    """Factors on the scale of start_percent: 0 is where a full sampling begins, 1 where it ends, however it is split.

    What acts at a step is decided as ComfyUI decides it for its ControlNets and hooks: by comparing the step's noise
    level with that of the percent, in the noise level's precision. A start of 0 and an end of 1 are no bounds at all.

    Args:
        sampling: the MODEL's model_sampling, which knows the noise level of every percent.
        start_percent, end_percent: outside them the factor is 0.
        curve: a CURVE from 0 to 1, or None.
        keyframes: HOOK_KEYFRAMES or None. The last one that has begun counts, guaranteed steps do not: a noise level
            has the same factor in whatever order and number of steps it is reached.
    """

    def __init__(self, sampling, start_percent: float = 0.0, end_percent: float = 1.0, curve=None,
                 keyframes: HookKeyframeGroup | None = None):
        def sigma_of(percent: float) -> float:
            return float(sampling.percent_to_sigma(percent))

        self._first = sigma_of(start_percent) if start_percent > 0.0 else float("inf")
        self._last = sigma_of(end_percent) if end_percent < 1.0 else float("-inf")
        self._curve = self._levels = None
        if curve is not None:
            self._curve = curve_factors(curve)
            self._levels = torch.tensor([sigma_of(step / STEPS) for step in range(STEPS + 1)], dtype=torch.float64)
        self._keyframes = [(sigma_of(keyframe.start_percent), keyframe.strength)
                           for keyframe in getattr(keyframes, "keyframes", ())]

    def __call__(self, sigma: torch.Tensor) -> float:
        """The factor at noise level ``sigma``, () on the CPU."""
        if sigma > self._first or sigma < self._last:
            return 0.0

        factor = 1.0
        if self._levels is not None:
            reached = int((self._levels.to(sigma.dtype) >= sigma).sum())
            factor = self._curve[max(reached - 1, 0)]
        if self._keyframes:
            begun = [strength for start, strength in self._keyframes if bool(sigma <= start)]
            factor *= begun[-1] if begun else self._keyframes[0][1]
        return factor


def curve_factors(curve) -> list[float]:
    """A CURVE's value at each of the STEPS + 1 percents."""
    return CurveInput.from_raw(curve).to_lut(STEPS + 1).tolist()


def factors_over_time(curve=None, keyframes: HookKeyframeGroup | None = None) -> list[float]:
    """The factor of ``StrengthOverTime`` at each of the STEPS + 1 percents, whatever the sampling."""
    factors = [1.0] * (STEPS + 1) if curve is None else curve_factors(curve)
    if keyframes is None or keyframes.is_empty():
        return factors
    return [factor * _strength_at(step / STEPS, keyframes.keyframes) for step, factor in enumerate(factors)]


def _strength_at(percent: float, keyframes: list[HookKeyframe]) -> float:
    begun = [keyframe for keyframe in keyframes if keyframe.start_percent <= percent]
    return begun[-1].strength if begun else keyframes[0].strength
