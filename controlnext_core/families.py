"""The ControlNeXt families, six of them released: the one table that says how they differ.

Everything else asks the table and never compares family names.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .bases import BASES
from .sentences import either


def _as_is(scale: float) -> float:
    return scale


def _fifth(scale: float) -> float:
    return 0.2 * scale


def _sigmoid(scale: float) -> float:
    return 1.3 / (1.0 + math.e ** -scale)


@dataclass(frozen=True)
class Family:
    """How one family computes its features and adds them to the denoiser.

    Attributes:
        name: the name people choose in the loader.
        base: the denoiser that it steers, a key of ``BASES``.
        layout: the state dict layout (see ``layouts``) that its files have.
        place_name: name of the place where the features enter the denoiser.
        pool_first: pool the features to the denoiser's size before normalizing them, not after.
        eps: added to the std of the features.
        released: the reference implementation has it; the others are this project's own.
        timed: the features of a new module depend on the timestep; those of a file do where it has the layers for it.
        gain: learned ``scale`` -> multiplier of the cond half.
        zero_negative_scale: the reference sets ``scale`` to 0 for the uncond half.
        stem_padding: padding of the stem's second and third convolution; the weights cannot tell it.
        stem_pool: halve the stem's output with a 2x2 max pooling; the weights cannot tell it.
        window_reference: the reference gives the first frame of every window of a long video the control of the whole
            video's first frame, the pose of the picture that is animated.
    """

    name: str
    base: str
    layout: str
    place_name: str
    pool_first: bool
    eps: float
    released: bool = True
    timed: bool = True
    gain: Callable[[float], float] = _as_is
    zero_negative_scale: bool = False
    stem_padding: int = 1
    stem_pool: bool = False
    window_reference: bool = False

    def gains(self, scale: float) -> tuple[float, float]:
        """Multipliers of the (cond, uncond) half for the learned ``scale``, 1.0 in files without one.

        A tensor, as it is while it is learned, gives tensors.
        """
        return self.gain(scale), self.gain(0.0 if self.zero_negative_scale else scale)


# pooled before they are normalized, features have the std of the tokens; pooled behind the stem, too, they are as fine
# as the tokens and cost a quarter
_TRANSFORMERS = [Family(base, base, "light", "tokens", pool_first=True, eps=1e-12, stem_pool=True, released=False,
                        timed=False)
                 for base in ("sd3", "flux", "chroma", "qwen_image", "flux2", "z_image", "wan",
                              "hunyuan_video15", "ltxv", "krea2", "anima", "auraflow", "ltx2")]
FAMILIES = {
    family.name: family
    for family in (
        Family("sd15", "sd15", "light", "down_0", pool_first=True, eps=1e-12),
        Family("sd15_mid", "sd15", "mid", "middle", pool_first=True, eps=1e-12),
        Family("sdxl", "sdxl", "light", "conv_in", pool_first=False, eps=1e-12),
        Family("svd", "svd", "light", "down_0", pool_first=False, eps=1e-5,
               gain=_fifth, zero_negative_scale=True, stem_padding=0, window_reference=True),
        Family("svd_padded", "svd", "light", "down_0", pool_first=False, eps=1e-5,
               gain=_fifth, zero_negative_scale=True, window_reference=True),
        Family("svd_mid", "svd", "video_mid", "before_middle", pool_first=False, eps=1e-5,
               gain=_sigmoid, zero_negative_scale=True, stem_padding=0, stem_pool=True),
        *_TRANSFORMERS,
    )
}


def families_of(layout: str) -> list[Family]:
    """Families whose files have this state dict layout, in the table's order. ``light`` files leave many."""
    return [family for family in FAMILIES.values() if family.layout == layout]


def family_for(layout: str, variant: str, base: str) -> Family:
    """The family of a file with ``layout``, loaded as ``variant``, for a denoiser of kind ``base``.

    ``auto`` takes the first family of the table that has the file's layout and the denoiser's base.

    Raises:
        ValueError: no family has this layout and base, or the named variant is for another base.
    """
    candidates = families_of(layout) if variant == "auto" else [FAMILIES[variant]]
    for family in candidates:
        if family.base == base:
            return family

    names = either(family.name for family in candidates)
    titles = either(BASES[family.base].title for family in candidates)
    title = BASES[base].title
    raise ValueError(f"model: the ControlNeXt file is {names} (for {titles}), but the connected MODEL is {title}; "
                     f"connect a MODEL of {titles} or load a ControlNeXt file for {title}.")
