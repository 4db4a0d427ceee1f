"""State dict layouts: every key of a ControlNeXt file with its shape, written in named widths.

The widths are read off the file by a vote over all its tensors, so a single wrong tensor is found and named.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from .sentences import quoted

RESNET = {
    "norm1.weight": ("{i}",), "norm1.bias": ("{i}",),
    "conv1.weight": ("{o}", "{i}", 3, 3), "conv1.bias": ("{o}",),
    "norm2.weight": ("{o}",), "norm2.bias": ("{o}",),
    "conv2.weight": ("{o}", "{o}", 3, 3), "conv2.bias": ("{o}",),
}
TIME_IN_RESNET = {"time_emb_proj.weight": ("{o}", "time"), "time_emb_proj.bias": ("{o}",)}
SHORTCUT = {"conv_shortcut.weight": ("{o}", "{i}", 1, 1), "conv_shortcut.bias": ("{o}",)}
DOWNSAMPLE = {"conv.weight": ("{o}", "{o}", 3, 3), "conv.bias": ("{o}",)}

TIME = {
    "time_embedding.linear_1.weight": ("time", "frequencies"), "time_embedding.linear_1.bias": ("time",),
    "time_embedding.linear_2.weight": ("time", "time"), "time_embedding.linear_2.bias": ("time",),
}
STEM = {
    "embedding.0.weight": ("stem_0", 3, 3, 3), "embedding.0.bias": ("stem_0",),
    "embedding.1.weight": ("stem_0",), "embedding.1.bias": ("stem_0",),
    "embedding.3.weight": ("stem_1", "stem_0", 3, 3), "embedding.3.bias": ("stem_1",),
    "embedding.4.weight": ("stem_1",), "embedding.4.bias": ("stem_1",),
    "embedding.6.weight": ("width_0", "stem_1", 3, 3), "embedding.6.bias": ("width_0",),
    "embedding.7.weight": ("width_0",), "embedding.7.bias": ("width_0",),
}
NORMED_MID = {
    "mid_convs.0.0.weight": ("{o}", "{o}", 3, 3), "mid_convs.0.0.bias": ("{o}",),
    "mid_convs.0.2.weight": ("{o}",), "mid_convs.0.2.bias": ("{o}",),
    "mid_convs.0.3.weight": ("{o}", "{o}", 3, 3), "mid_convs.0.3.bias": ("{o}",),
    "mid_convs.0.4.weight": ("{o}",), "mid_convs.0.4.bias": ("{o}",),
}
PLAIN_MID = {
    "mid_convs.0.0.weight": ("{o}", "{o}", 3, 3), "mid_convs.0.0.bias": ("{o}",),
    "mid_convs.0.2.weight": ("{o}", "{o}", 3, 3), "mid_convs.0.2.bias": ("{o}",),
}
OUT = {"mid_convs.1.weight": ("out", "{o}", 1, 1), "mid_convs.1.bias": ("out",)}

# the reference's widths by layout
WIDTHS = {
    "light": dict(frequencies=128, time=256, stem_0=64, stem_1=64, width_0=128, width_1=128, width_2=256, out=320),
    "mid": dict(frequencies=128, time=256, width_0=3, width_1=128, width_2=256, width_3=256, out=1280),
    "video_mid": dict(frequencies=128, time=256, stem_0=64, stem_1=64, width_0=128, width_1=128, width_2=256,
                      width_3=256, out=1280),
}
TIME_WIDTHS = ("frequencies", "time")  # a module without time lacks them
# widths of a new module without time: the stem takes more than a third of what it computes (benchmarks/without_time.py)
WITHOUT_TIME = dict(stem_1=48)


def layout_of(keys: Sequence[str]) -> str:
    """``mid`` (no stem), ``video_mid`` (stem and a third stage) or ``light``, as the reference's classes differ."""
    if "embedding.0.weight" not in keys:
        return "mid"
    return "video_mid" if "down_res.2.conv1.weight" in keys else "light"


def stages_of(keys: Sequence[str]) -> int:
    """Number of resnet + downsample stages."""
    return len({match[1] for key in keys if (match := re.match(r"down_res\.(\d+)\.", key))})


def expected_shapes(keys: Sequence[str]) -> dict[str, tuple]:
    """{key: shape in named widths} of a file with these keys: what must be there, whatever else is.

    ``width_i`` is the width that enters stage i; a shortcut convolution is expected where the file has one, and all of
    the timestep's layers where it has any.
    """
    stem = "embedding.0.weight" in keys
    timed = any("time_emb" in key for key in keys)
    stages = stages_of(keys)
    shapes: dict[str, tuple] = dict(TIME) if timed else {}
    if stem:
        shapes |= STEM
    for stage in range(stages):
        block = RESNET | TIME_IN_RESNET if timed else dict(RESNET)
        if any(key.startswith(f"down_res.{stage}.conv_shortcut.") for key in keys):
            block |= SHORTCUT
        names = {"i": f"width_{stage}", "o": f"width_{stage + 1}"}
        for prefix, table in ((f"down_res.{stage}", block), (f"down_sample.{stage}", DOWNSAMPLE)):
            shapes |= {f"{prefix}.{key}": _in_widths(shape, names) for key, shape in table.items()}
    for table in (NORMED_MID if stem else PLAIN_MID, OUT):
        shapes |= {key: _in_widths(shape, {"o": f"width_{stages}"}) for key, shape in table.items()}
    return shapes


def _in_widths(shape: tuple, names: Mapping[str, str]) -> tuple:
    return tuple(dim.format(**names) if isinstance(dim, str) else dim for dim in shape)


def solve_widths(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Every named width of a state dict, by the vote of all tensors that show it.

    Args:
        shapes: {key: shape} with prefixes stripped.

    Raises:
        ValueError: a key is missing, not ControlNeXt's, or its shape disagrees with the others' or with what the module
            computes; it is named.
    """
    expected = expected_shapes(list(shapes))
    missing = [key for key in expected if key not in shapes]
    if missing:
        raise ValueError(f"{_some(missing)} is missing")
    extra = [key for key in shapes if key not in expected and key != "scale"]
    if extra:
        raise ValueError(f"{_some(extra)} is not part of any ControlNeXt model")

    votes: dict[str, Counter] = defaultdict(Counter)
    for key, names in expected.items():
        if len(shapes[key]) != len(names) or 0 in shapes[key]:
            raise ValueError(f"tensor {key} has shape {quoted(list(shapes[key]))} where {len(names)} sizes above 0 are "
                             f"expected")
        for name, width in zip(names, shapes[key], strict=True):
            if isinstance(name, str):
                votes[name][width] += 1
    widths = {name: vote.most_common(1)[0][0] for name, vote in votes.items()}

    for key, names in expected.items():
        right = [widths[name] if isinstance(name, str) else name for name in names]
        if list(shapes[key]) != right:
            raise ValueError(f"tensor {key} has shape {list(shapes[key])} where {right} is expected")
    if tuple(shapes.get("scale", ())) not in ((), (1,)):
        raise ValueError(f"tensor scale has shape {quoted(list(shapes['scale']))} where a single number is expected")
    _check_widths(widths, expected)
    return widths


def _check_widths(widths: Mapping[str, int], expected: Mapping[str, tuple]) -> None:
    """ValueError: no module of these widths could run, although all tensors agree on them."""
    if widths.get("frequencies", 0) % 2:
        raise ValueError(f"tensor time_embedding.linear_1.weight takes {widths['frequencies']} frequencies where an "
                         f"even number is expected")
    if "stem_0" not in widths and widths["width_0"] != 3:
        raise ValueError(f"tensor down_res.0.conv1.weight takes images of {widths['width_0']} channels where 3 are "
                         f"expected")
    for stage in range(stages_of(list(expected))):
        shortcut = f"down_res.{stage}.conv_shortcut.weight"
        if widths[f"width_{stage}"] != widths[f"width_{stage + 1}"] and shortcut not in expected:
            raise ValueError(f"tensor {shortcut} is missing")


def _some(keys: list[str]) -> str:
    return f"tensor {quoted(keys[0])}" + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
