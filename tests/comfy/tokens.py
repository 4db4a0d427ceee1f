"""Transformers under control, seen from outside: plain torch hooks on the blocks of ComfyUI's real classes.

They are the independent rewrite that the tests compare with: of this project they take the module alone.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from models import NARROW, TRANSFORMERS
from sampling import TOKENS, conds, latent, picture, sample

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module

BLOCK_BEHIND = {"tokens": 0, "block_0": 1, "block_1": 2}


@dataclasses.dataclass(frozen=True)
class Base:
    """What the hooks need to know of a base.

    Attributes:
        blocks: name of the list of blocks.
        picture, text: how a block gets the picture's and the text's tokens: position or keyword. The same one where all
            of them are one sequence.
        width: of a token in the small model.
        time: the transformer's timestep at sigma 1.
        ratio: pixels that a latent pixel stands for.
        patch: latent pixels that a token stands for.
        before: tokens of text that stand before the picture's.
        fill: the picture's tokens are the last ones, filled up to a multiple of this.
        frames: of the small model's latents, of a video: the first one is an image's.
        images: that each of the others stands for.
        places: where control can enter, of those in BLOCK_BEHIND and the point behind the first block.
    """

    blocks: str
    picture: int | str
    text: int | str
    width: int
    time: float = 1.0
    ratio: int = 8
    patch: int = 2
    before: int = 0
    fill: int | None = None
    frames: int = 1
    images: int = 4
    places: tuple[str, ...] = ("tokens", "block_0", "block_1")

    @property
    def side(self) -> int:
        """Pixels of a picture of 4 x 4 tokens."""
        return 4 * self.patch * self.ratio

    def picture_in(self, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is before the picture's ``count`` tokens in a sequence (B, N, C), they, and what is behind them."""
        start = tokens.shape[1] - math.ceil(count / self.fill) * self.fill if self.fill else self.before
        return tokens[:, :start], tokens[:, start:start + count], tokens[:, start + count:]


BASES = {
    "sd3": Base("joint_blocks", 1, 0, 192, 1000.0),
    "flux": Base("double_blocks", "img", "txt", 128),
    "chroma": Base("double_blocks", "img", "txt", 128),
    "qwen_image": Base("transformer_blocks", "hidden_states", "encoder_hidden_states", 128),
    "flux2": Base("double_blocks", "img", "txt", 128, ratio=16, patch=1),
    "z_image": Base("layers", 0, 0, 256, fill=32),
    "wan": Base("blocks", 0, "context", 128, 1000.0, frames=2),
    "hunyuan_video15": Base("double_blocks", "img", "txt", 128, 1000.0, ratio=16, patch=1, frames=2),
    "ltxv": Base("transformer_blocks", 0, "context", 128, ratio=32, patch=1, frames=2, images=8),
    "krea2": Base("blocks", 0, 0, 128, places=("tokens",), before=TOKENS),
    "anima": Base("blocks", 0, 2, 128, places=("tokens",)),
    "auraflow": Base("double_layers", 1, 0, 128),
    "ltx2": Base("transformer_blocks", 0, "v_context", 128, ratio=32, patch=1, frames=2, images=8),
}
BASES = {base: row for base, row in BASES.items() if base == "sd3" or base in TRANSFORMERS}
ENTERED = [(base, place) for base, row in BASES.items() for place in row.places if place != "block_0"]
VIDEOS = [base for base, row in BASES.items() if row.frames > 1]


def picture_for(base: str, seed: int = 0, count: int = 1) -> torch.Tensor:
    """Control images as large as what ``drawn`` draws."""
    return picture(seed, count, BASES[base].side, BASES[base].side)


def new_controlnext(pack, base: str, width: int | None = None, timed: bool = False):
    """A CONTROLNEXT for the small model of a base, or one of another width; with time, as older files have it."""
    family = dataclasses.replace(FAMILIES[base], timed=timed)
    module = new_module(family, seed=1, out=width or BASES[base].width, **NARROW)
    return pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), "auto", "small.safetensors", {})


def drawn(base: str, model, positive=None, negative=None, batch=1, size=None, **options) -> torch.Tensor:
    """A latent of (H, W), as large as ``picture_for`` if not given."""
    prompts, side = conds(model), 4 * BASES[base].patch
    return sample(model, positive or prompts[0], negative or prompts[1], latent(base, batch, *(size or (side, side))),
                  **{"cfg": 3.0, "steps": 1, **options})


def with_reference(base: str, positive):
    """A conditioning that carries one reference latent of 4 x 6 tokens."""
    empty = latent(base, 1, *(side * BASES[base].patch for side in (4, 6)))
    reference = torch.randn(empty.shape, generator=torch.Generator().manual_seed(0))
    return [[context, {**extra, "reference_latents": [reference]}] for context, extra in positive]


def module_features(controlnext, image, timestep, grid, frames, images) -> torch.Tensor:
    """Normalized features as tokens, (1, frames * h * w, C); those of a latent frame are the mean of its images'."""
    tokens = []
    for frame in frames:
        shown = [0] if frame == 0 else range(images * (frame - 1) + 1, images * frame + 1)
        features = controlnext.patcher.model(image[[index % len(image) for index in shown]].movedim(-1, 1), timestep, 1,
                                             True)
        features = F.adaptive_avg_pool2d(features, grid).mean(0, keepdim=True)
        normal = (features - features.mean((1, 2, 3), keepdim=True)) / features.std((1, 2, 3), keepdim=True)
        tokens.append(normal.flatten(2).transpose(1, 2))
    return torch.cat(tokens, 1)


@contextmanager
def entering(base: str, model, block: int, change: Callable):
    """Have ``change(picture, text)`` see the tokens that enter a block, and replace the picture's unless it is None."""
    row = BASES[base]

    def hook(_, args, kwargs):
        given = {**dict(enumerate(args)), **kwargs}
        streams = given[row.picture]  # the picture's tokens, or a tuple of them and those of a sound
        tokens = streams[0] if isinstance(streams, tuple) else streams
        changed = change(tokens.flatten(1, -2), given[row.text])  # some keep frames, rows and columns apart
        if changed is not None:
            changed = changed.view_as(tokens)
            given[row.picture] = (changed, *streams[1:]) if isinstance(streams, tuple) else changed
        return tuple(given[index] for index in range(len(args))), {name: given[name] for name in kwargs}
    handle = getattr(model.model.diffusion_model, row.blocks)[block].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def by_hand(base: str, model, controlnext, blocks: dict[int, list], grid=(4, 4), windows=None):
    """Add control before blocks of a model, {block: [(image, strength)]}, all normalized against the same tokens.

    Args:
        windows: the frames that each forward gets, one after the other; None for all in each.
    """
    timestep, frames, windows = [], [], itertools.cycle(windows or [range(BASES[base].frames)])

    def entered(_, args):
        t = args[1][0] if isinstance(args[1], tuple) else args[1]  # a sound has one of its own
        timestep.append(t[:1].reshape(1, -1).amax(1) * 1000 / BASES[base].time)  # given frames have one of 0
        frames.append(next(windows))

    def adding(added):
        images = BASES[base].images

        def add(tokens, _):
            before, x, behind = BASES[base].picture_in(tokens, len(frames[-1]) * grid[0] * grid[1])
            mean, std = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)
            x = x + sum(
                strength * (module_features(controlnext, image, timestep[-1], grid, frames[-1], images) * std + mean)
                for image, strength in added)
            return torch.cat([before, x, behind], 1)
        return add
    with ExitStack() as stack:
        stack.callback(model.model.diffusion_model.register_forward_pre_hook(entered).remove)
        for block, added in blocks.items():
            stack.enter_context(entering(base, model, block, adding(added)))
        yield
