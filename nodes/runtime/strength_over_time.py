"""A factor of the control's strength for every moment of the sampling, from ComfyUI's curves and hook keyframes."""

from bisect import bisect_right

from comfy.hooks import HookKeyframe, HookKeyframeGroup

try:
    from comfy_api.input import CurveInput
except ImportError:  # ComfyUI before its Curve Editor
    CurveInput = None

STEPS = 1000  # of the sampling's percents, as fine as start_percent


class StrengthOverTime:
    """Factors on the scale of start_percent: 0 is where a full sampling begins, 1 where it ends, however it is split.

    Args:
        sampling: the MODEL's model_sampling, which knows the noise level of every percent.
        curve: a CURVE from 0 to 1, or None.
        keyframes: HOOK_KEYFRAMES or None. The last one that has begun counts, guaranteed steps do not: a noise level
            has the same factor in whatever order and number of steps it is reached.
    """

    def __init__(self, sampling, curve=None, keyframes: HookKeyframeGroup | None = None):
        self.factors = [1.0] * (STEPS + 1) if curve is None else CurveInput.from_raw(curve).to_lut(STEPS + 1).tolist()
        if keyframes is not None and not keyframes.is_empty():
            self.factors = [factor * _strength_at(step / STEPS, keyframes.keyframes)
                            for step, factor in enumerate(self.factors)]
        self._levels = [-sampling.percent_to_sigma(step / STEPS) for step in range(STEPS + 1)]

    def __call__(self, sigma: float) -> float:
        """The factor at noise level ``sigma``."""
        return self.factors[bisect_right(self._levels, -sigma) - 1]


def _strength_at(percent: float, keyframes: list[HookKeyframe]) -> float:
    begun = [keyframe for keyframe in keyframes if keyframe.start_percent <= percent]
    return begun[-1].strength if begun else keyframes[0].strength
