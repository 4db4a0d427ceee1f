"""Pictures and captions as VAE and CLIP encode them, in files: written once, read back when a training needs them."""

import json
import os
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...controlnext_core.sentences import quoted
from ...controlnext_core.sizes import as_bytes
from ..runtime.files import unshared, write_whole

ENDING = ".safetensors"
EXTRAS = "extras"  # metadata of a caption: what is no tensor
SAME_ENCODER = 1e-3  # relative distance of what two encoders make of the same thing, if they are one
PROBE_SIZE = 64  # pixels
PROBE_TEXT = "a photograph of a red fox in deep snow, 4k"


def half(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in half precision: fp16, or bf16 where its numbers are too large for that. Integers stay."""
    if not tensor.is_floating_point():
        return tensor
    halved = tensor.to(torch.float16)
    return halved if halved.isfinite().all() else tensor.to(torch.bfloat16)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The same in float32 again."""
    return tensor.float() if tensor.is_floating_point() else tensor


class Folder:
    """A folder of encoded pictures and captions; a name says all that its content depends on.

    Args:
        path: made when something is written.
    """

    def __init__(self, path: str):
        self.path = path

    def file(self, kind: str, name: str) -> str:
        """The path for a name, in the folder of its kind: pictures, captions or encoders."""
        return os.path.join(self.path, kind, name + ENDING)

    def has(self, kind: str, name: str) -> bool:
        return os.path.isfile(self.file(kind, name))

    def write(self, kind: str, name: str, tensors: dict[str, torch.Tensor], extras: dict | None = None) -> None:
        """Raises ValueError: the disk refuses."""
        path = self.file(kind, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with write_whole(path, "folder") as part:
            save_file(unshared(tensors), part, {EXTRAS: json.dumps(extras or {})})

    def read(self, kind: str, name: str) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, extras) as written. ValueError: the file is gone or damaged."""
        with self._opened(kind, name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[EXTRAS])

    def shape(self, kind: str, name: str, key: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it. ValueError: the file is gone or damaged."""
        with self._opened(kind, name) as file:
            return tuple(file.get_slice(key).get_shape())

    @contextmanager
    def _opened(self, kind: str, name: str):
        try:
            with safe_open(self.file(kind, name), "pt") as file:
                yield file
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"dataset: {quoted(os.path.join(kind, name + ENDING))} in {quoted(self.path)} is gone or "
                             f"damaged ({type(error).__name__}); delete it and queue the graph again to encode it "
                             "anew.") from error

    def encoder(self, kind: str, probe: torch.Tensor) -> str:
        """The name of the encoder that made this of a probe, the same one each time.

        Encoders are told apart by their results, so that patches count too; they are compared with a tolerance, since a
        GPU rounds a little differently from run to run.
        """
        probe, count = probe.float().cpu(), 0
        while self.has("encoders", f"{kind}_{count}"):
            known = self.read("encoders", f"{kind}_{count}")[0]["probe"]
            if known.shape == probe.shape and (known - probe).norm() <= SAME_ENCODER * known.norm():
                return f"{kind}_{count}"
            count += 1
        self.write("encoders", f"{kind}_{count}", {"probe": probe})
        return f"{kind}_{count}"


def vae_probe(vae) -> torch.Tensor:
    """A VAE's latent of a fixed picture."""
    return vae.encode(torch.rand(1, PROBE_SIZE, PROBE_SIZE, 3, generator=torch.Generator().manual_seed(0)))


def clip_probe(clip) -> torch.Tensor:
    """A CLIP's numbers for a fixed text."""
    tensors, _ = as_tensors(encode_text(clip, PROBE_TEXT))
    return torch.cat([tensor.float().flatten() for tensor in tensors.values()])


def encode_text(clip, text: str) -> list:
    """The entry of a CONDITIONING for a text, as CLIP Text Encode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def as_tensors(entry: list) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, what is none) of an entry of a CONDITIONING. ValueError: it holds something else."""
    cond, more = entry
    tensors = {"cond": cond} | {f"more.{name}": value for name, value in more.items() if torch.is_tensor(value)}
    extras = {name: value for name, value in more.items() if not torch.is_tensor(value)}
    for name, value in extras.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ValueError(f"clip: what the connected CLIP makes of a caption holds {quoted(name)}, a "
                             f"{type(value).__name__}, which no file can keep; connect latents, conditioning and "
                             "images to Train ControlNeXt instead.")
    return {name: half(tensor) for name, tensor in tensors.items()}, extras


def as_entry(tensors: dict[str, torch.Tensor], extras: dict) -> list:
    """The entry of a CONDITIONING again, in float32."""
    more = {name.removeprefix("more."): full(tensor) for name, tensor in tensors.items() if name != "cond"}
    return [full(tensors["cond"]), more | extras]


def packed(image: torch.Tensor) -> torch.Tensor:
    """An image (1, H, W, 3) in [0, 1] as the bytes of a PNG, (N,) uint8; exact for images of 8 bits."""
    pixels = as_bytes(image[0])
    _, data = cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))
    return torch.from_numpy(data.flatten())


def unpacked(data: torch.Tensor) -> torch.Tensor:
    """The image (1, H, W, 3), float32 in [0, 1], again."""
    pixels = cv2.imdecode(data.numpy(), cv2.IMREAD_COLOR)[..., ::-1]
    return torch.from_numpy(pixels.astype(np.float32) / 255.0)[None]
