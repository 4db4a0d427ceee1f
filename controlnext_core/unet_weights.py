"""The second file of a release, UNet weights: to which tensors of a model they go, how, and in which order.

A difference file holds W_finetuned - W_base and is added; any other file replaces. No name says which, the values do.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from .bases import BASES, bases_of, without_prefix
from .checkpoint import CONTROL, check_finite, check_floats, is_control, kind_of_file, named_tensors, strip_prefixes
from .sentences import either, quoted
from .unet_keys import Target, targets_of

# a full file's tensors point the way of the base weights and have their size; differences do neither
SAME_COSINE = 0.5
SAME_SIZE = (0.5, 2.0)
SAMPLED_TENSORS = 16
# a ControlNet is half a UNet and names that half alike, and a ControlNeXt model has a time embedding too
NAMED_ALIKE = ("a full ControlNet", "a ControlNeXt model")
QUANTISED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")  # what goes with quantised weights
TINY = 1e-12


@dataclass(frozen=True)
class UNetWeights:
    """The weights that a file holds for one model.

    Attributes:
        tensors: {LDM key of the model: the file's tensor}.
        left_out: the file's keys that the model lacks.
        other_base: names of the base that the file seems made for although all its tensors fit.
        partial: keys in ``tensors`` of which the file has a part only (some of q, k and v); the rest is zeros.
        declared: difference or replace, where the file says so.
    """

    tensors: dict[str, torch.Tensor]
    left_out: list[str]
    other_base: str | None
    partial: list[str]
    declared: str | None = None


@dataclass(frozen=True)
class Likeness:
    """How a file's tensors compare with the base weights: the medians over a sample of them.

    Attributes:
        cosine: the cosine of the angle between them, 1 where both point the same way.
        size: the file's norm as a share of the base weights'.
    """

    cosine: float
    size: float

    @property
    def mode(self) -> str:
        """``replace`` for a full file, ``difference`` for anything else."""
        return "replace" if self.cosine > SAME_COSINE and SAME_SIZE[0] < self.size < SAME_SIZE[1] else "difference"


def match_weights(state_dict: Mapping, name: str, shapes: Mapping[str, tuple],
                  declared: str | None = None) -> UNetWeights:
    """Match a file's tensors with a model's, by diffusers or LDM names, with or without prefix.

    Args:
        state_dict: {key: tensor} as it came from the file, a control beside them and all.
        name: the file's name, for messages.
        shapes: {key: shape} of the model's UNet in LDM names, without prefix.
        declared: what the file's metadata says that it is.

    Raises:
        ValueError: nothing matches (says what the file is), another base's UNet, quantised weights, weights that are no
            plain floating point numbers or not finite, a tensor of another shape (named).
    """
    name = quoted(name)
    state_dict = strip_prefixes(named_tensors(state_dict))
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith(CONTROL)}
    if not state_dict:
        raise ValueError(f"{name} holds no tensors with names; download it again or choose another file.")
    if any(key.endswith(QUANTISED) for key in state_dict):
        raise ValueError(f"{name} is quantised (its weights go with scales), but what is added to a MODEL has to be "
                         f"plain numbers; take the same weights in fp16.")

    targets = targets_of(shapes)
    matched, left_out = [], []
    for key, value in state_dict.items():
        bare = without_prefix(key)
        target = Target(bare) if bare in shapes else targets.get(bare)
        if target is None:
            left_out.append(key)
        else:
            matched.append((target, value))

    what = _kind_of_unet_file(state_dict)
    if not matched or what.startswith(NAMED_ALIKE):
        raise ValueError(f"{name} holds no UNet weights for the connected MODEL: it is {what}; choose the UNet weights "
                         f"that came with the ControlNeXt model (often called unet.safetensors).")

    check_floats(((target.key, value) for target, value in matched), name)
    expected = [target.shape(shapes[target.key]) for target, _ in matched]
    wrong = [(target.key, value.shape, shape) for (target, value), shape in zip(matched, expected, strict=True)
             if value.shape != shape]

    bases, model_bases = bases_of(state_dict), bases_of(shapes)
    other_base = _titles(bases) if bases and model_bases and not set(bases) & set(model_bases) else None
    if other_base and (wrong or left_out):
        raise ValueError(f"{name} holds UNet weights for {other_base}, but the connected MODEL is "
                         f"{_titles(model_bases)}; connect a MODEL of {other_base} or choose UNet weights for "
                         f"{_titles(model_bases)}.")
    if wrong:
        key, found, shape = wrong[0]
        more = f" (and {len(wrong) - 1} more tensors differ)" if len(wrong) > 1 else ""
        raise ValueError(f"{name}: tensor {quoted(key)} has shape {quoted(list(found))} where the connected MODEL has "
                         f"{list(shape)}{more}; choose UNet weights that were made for this MODEL.")

    tensors, partial = _put_together(matched, shapes)
    check_finite(tensors.items(), name)
    return UNetWeights(tensors, left_out, other_base, partial, declared)


def _put_together(matched: Iterable[tuple[Target, torch.Tensor]],
                  shapes: Mapping[str, tuple]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """({key: tensor} of the model, the keys of which some rows are missing and zeros)."""
    tensors, parts = {}, defaultdict(dict)
    for target, value in matched:
        if target.rows is None:
            tensors[target.key] = target.ordered(value)
        else:
            parts[target.key][target.rows] = value

    for key, rows in parts.items():
        whole = torch.zeros(shapes[key], dtype=next(iter(rows.values())).dtype)
        for (first, count), value in rows.items():
            whole[first:first + count] = value
        tensors.setdefault(key, whole)

    filled = {key: sum(count for _, count in rows) for key, rows in parts.items()}
    return tensors, [key for key, rows in filled.items() if rows < shapes[key][0]]


def _titles(bases: Iterable[str]) -> str:
    return either(BASES[base].title for base in bases)


def _kind_of_unet_file(keys: Iterable[str]) -> str:
    """The kind of a file, told from its keys, as somebody who looks for UNet weights wants to hear it."""
    keys = list(keys)
    if is_control(keys):
        return "a ControlNeXt model (Load ControlNeXt Model takes it)"

    what = kind_of_file(keys)
    if what != "UNet weights":
        return what
    if any(key.endswith((".diff", ".diff_b")) for key in keys):
        return "a LoRA (Load LoRA takes it)"
    bases = bases_of(keys)
    return f"UNet weights for {_titles(bases)}" if bases else "UNet weights of another kind of model"


def compare(tensors: Mapping[str, torch.Tensor], base_weight: Callable[[str], torch.Tensor]) -> Likeness:
    """Compare a sample of a file's weight matrices, evenly spread through the model, with the base weights.

    Args:
        tensors: {LDM key: tensor}.
        base_weight: LDM key -> the model's float32 weight of the same shape, on any device.
    """
    keys = [key for key, value in tensors.items() if value.ndim > 1] or list(tensors)
    cosines, sizes = [], []
    for key in keys[::-(-len(keys) // SAMPLED_TENSORS)]:
        base = base_weight(key).flatten()
        value = tensors[key].flatten().to(base)
        norm, base_norm = float(value.norm()), float(base.norm())
        cosines.append(float(value @ base) / max(norm * base_norm, TINY))
        sizes.append(norm / max(base_norm, TINY))
    return Likeness(median(cosines), median(sizes))


def split_patches(patches: Iterable[tuple]) -> tuple[list[tuple], list[tuple]]:
    """Part one weight's patches into those that make its base and those that add to it.

    A patch whose strength_model is not 1 (a merge, a replacement) multiplies the weight before it adds, LoRAs included;
    taking these past it scales their strength alike, so the two lists one after the other give the same weight.

    Args:
        patches: in ComfyUI's form, (strength, value, strength_model, offset, function), in the order of application.

    Returns:
        (base, additions), both in that form.
    """
    base, additions = [], []
    for patch in patches:
        if patch[2] == 1.0:
            additions.append(patch)
        else:
            base.append(patch)
            additions = [(strength * patch[2], *rest) for strength, *rest in additions]
    return base, additions


def move_to_base(patches: list[tuple]) -> list[tuple]:
    """The patches with the last one moved to where the base is complete and nothing is added to it yet.

    So a LoRA acts on top of a replacement wherever it stands in the graph, as it does in the reference.
    """
    base, additions = split_patches(patches[:-1])
    return [*base, patches[-1], *additions]


def lora_key(key: str) -> str:
    """Name of a full difference for an LDM key in ComfyUI's own LoRA files."""
    if key.endswith(".bias"):
        return f"diffusion_model.{key.removesuffix('.bias')}.diff_b"
    return f"diffusion_model.{key.removesuffix('.weight')}.diff"


def low_rank(difference: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The closest product of two smaller tensors: the singular value decomposition, cut at ``rank``.

    Args:
        difference: (out, in) or (out, in, *kernel), float32.
        rank: at least 1; cut to the matrix's own.

    Returns:
        (up, down) of shapes (out, rank[, 1 ...]) and (rank, in[, *kernel]), of like magnitude so that both fit half
        precision.
    """
    kernel = difference.shape[2:]
    matrix = difference.flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    if not wide:
        matrix = matrix.T
    # the singular vectors of the short side, 3 to 30 times faster than linalg.svd
    short = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    long = short.T @ matrix
    root = long.norm(dim=1, keepdim=True).sqrt().clamp_min(TINY)
    up, down = (short * root.T, long / root) if wide else ((long / root).T, (short * root.T).T)
    return up.reshape(*up.shape, *[1] * len(kernel)), down.reshape(len(down), -1, *kernel)
