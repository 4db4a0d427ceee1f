"""A data set of any size: a folder of pictures, encoded once into files that a training reads as it needs them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch

from ...controlnext_core.bases import BASES
from ...controlnext_core.canny import edges
from ...controlnext_core.ranks import Ranks
from ...controlnext_core.sentences import quoted
from ..runtime.files import fingerprint
from ..runtime.resolve import base_of_model, model_of
from .data import Data, Sample, alike, check_caption
from .encoded import Folder, as_entry, as_tensors, clip_probe, encode_text, full, half, packed, unpacked, vae_probe
from .pictures import Picture, bucket_size, pictures_in, read_picture, resized, size_of

NAMED = 5  # pictures that a warning names
DEGRADED = "degraded picture"


def mask(picture: torch.Tensor, threshold: float) -> torch.Tensor:
    """White where a picture (1, H, W, 3) is as bright as ``threshold`` or brighter, black elsewhere."""
    return (picture.mean(-1, keepdim=True) >= threshold).float().expand_as(picture)


# what is made of a picture and a threshold where there is no folder of control images
CONTROLS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "canny": lambda picture, threshold: edges(picture), "mask": mask, DEGRADED: lambda picture, threshold: picture}


@dataclass(frozen=True)
class DataSettings:
    """The folders, the size and the control of a data set.

    Attributes:
        folder: of the pictures and their captions.
        size, buckets: as ``bucket_size`` takes them.
        control: a key of ``CONTROLS``, for where there is no control_folder.
        threshold: of the control.
        control_folder, weights_folder: of control images, and of what each position counts in the loss, by the
            pictures' names; or None.
    """

    folder: str
    size: int = 512
    buckets: bool = True
    control: str = "canny"
    threshold: float = 0.5
    control_folder: str | None = None
    weights_folder: str | None = None


@dataclass(frozen=True)
class Row:
    """A sample that is encoded: the names of its files, and its picture's (height, width)."""

    picture: str
    caption: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Dataset:
    """The object on a CONTROLNEXT_DATASET link.

    Attributes:
        folder: of the encoded files.
        rows: the samples, those that count several times as often.
        empty: the name of the empty caption.
        worn: control images are the pictures, to be made small and worn whenever one comes up.
    """

    folder: Folder
    rows: tuple[Row, ...]
    empty: str
    worn: bool = False


@dataclass(frozen=True)
class Planned:
    """A picture that is to be there encoded, and what belongs to it."""

    picture: Picture
    name: str
    size: tuple[int, int]
    control: str | None
    weight: str | None


class LeftOut:
    """Names of pictures that no sample is made of, each with the reason."""

    def __init__(self):
        self.reasons: dict[str, str] = {}

    def add(self, picture: Picture, reason: str) -> None:
        self.reasons[picture.name] = reason

    def add_unreadable(self, picture: Picture, error: Exception) -> None:
        self.add(picture, f"cannot be read: {str(error) or type(error).__name__}")

    def __str__(self) -> str:
        named = [f"{quoted(name)} ({reason})" for name, reason in list(self.reasons.items())[:NAMED]]
        more = len(self.reasons) - len(named)
        return ", ".join([*named, f"and {more} more"] if more else named)


def encode(settings: DataSettings, vae, clip, cache: str, ranks: Ranks) -> tuple[Dataset, int, LeftOut]:
    """Encode what is not encoded yet; interrupted, it goes on there the next time.

    Args:
        cache: path of the folder for the encoded files.
        ranks: processes that encode a part each.

    Returns:
        (the data set, how many pictures this process encoded, those that were left out).

    Raises:
        ValueError: there is no picture, or the disk refuses; names the input.
    """
    folder, left_out = Folder(cache), LeftOut()
    vae_name = folder.encoder("vae", vae_probe(vae))
    clip_name = folder.encoder("clip", clip_probe(clip))
    planned = plan(settings, vae_name, left_out)
    texts = {one.picture.name: one.picture.caption for one in planned}
    captions = {text: _digest(clip_name, text) for text in ("", *texts.values())}

    pending = [(text, name) for text, name in captions.items() if not folder.has("captions", name)]
    for text, name in _watched(ranks.share(pending)):
        folder.write("captions", name, *as_tensors(encode_text(clip, text)))

    pending = ranks.share([one for one in planned if not folder.has("pictures", one.name)])
    encoded = 0
    for one in _watched(pending):
        try:
            tensors = _parts_of(one, settings)
        except Exception as error:  # whatever a file's bytes make of Pillow
            left_out.add_unreadable(one.picture, error)
            continue
        latent = vae.encode(tensors.pop("pixels"))
        if "weight" in tensors:
            tensors["weight"] = comfy.utils.reshape_mask(tensors["weight"], latent.shape)[:, :1]
        folder.write("pictures", one.name, {"latent": half(latent), **tensors})
        encoded += 1

    ranks.wait_for_all()
    rows = [Row(one.name, captions[texts[one.picture.name]], one.size) for one in planned
            if folder.has("pictures", one.name) for _ in range(one.picture.repeats)]
    if not rows:
        reason = f"; left out: {left_out}" if left_out.reasons else ""
        raise ValueError(f"folder: there is no picture in {quoted(os.path.basename(settings.folder))} that can be "
                         f"trained on{reason}; put .png, .jpg or .webp files there, and captions as .txt beside them.")
    worn = settings.control_folder is None and settings.control == DEGRADED
    return Dataset(folder, tuple(rows), captions[""], worn), encoded, left_out


def plan(settings: DataSettings, vae_name: str, left_out: LeftOut) -> list[Planned]:
    """The pictures of a folder with what belongs to them; a name changes with all that the encoded file depends on."""
    pictures = pictures_in(settings.folder)
    folders = {"control": settings.control_folder, "weights": settings.weights_folder}
    others = {kind: {one.name: one.path for one in pictures_in(folder)} for kind, folder in folders.items() if folder}

    planned = []
    for picture in pictures:
        missing = [kind for kind, paths in others.items() if picture.name not in paths]
        if missing:
            left_out.add(picture, f"nothing of its name in {missing[0]}_folder")
            continue
        try:
            size = bucket_size(*size_of(picture.path), settings.size, settings.buckets)
        except Exception as error:  # whatever a file's bytes make of Pillow
            left_out.add_unreadable(picture, error)
            continue
        control, weight = (others.get(kind, {}).get(picture.name) for kind in folders)
        made = None if control else (settings.control, settings.threshold)
        stats = [os.stat(path) for path in (picture.path, control, weight) if path]
        states = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        name = _digest(vae_name, picture.name, states, bool(control), bool(weight), size, made)
        planned.append(Planned(picture, name, size, control, weight))
    return planned


def _parts_of(one: Planned, settings: DataSettings) -> dict[str, torch.Tensor]:
    """The picture's pixels (1, H, W, 3), its packed control and, if there is one, its weight (1, H, W).

    Raises what Pillow raises, and ValueError for weights that are black everywhere.
    """
    pixels = resized(read_picture(one.picture.path), one.size)
    if one.control:
        control = resized(read_picture(one.control), one.size)
    else:
        control = CONTROLS[settings.control](pixels, settings.threshold)
    parts = {"pixels": pixels, "control": packed(control)}
    if one.weight:
        parts["weight"] = resized(read_picture(one.weight), one.size).mean(-1)
        if not parts["weight"].any():
            raise ValueError("its weights are black everywhere")
    return parts


def changes_of(*folders: str | None) -> str:
    """Another text when a file in these folders is another one."""
    walks = [walk for folder in folders if folder for walk in os.walk(folder)]
    paths = sorted(os.path.join(parent, name) for parent, _, names in walks for name in names)
    return fingerprint(*filter(os.path.exists, paths))  # a link that leads nowhere counts for nothing


def _digest(*values) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def _watched(items: Sequence):
    """The items one after the other, with ComfyUI's progress bar, until somebody interrupts."""
    progress = comfy.utils.ProgressBar(len(items))
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        progress.update(1)


class FolderData(Data):
    """The samples of a Dataset, read when they are asked for; the next batch is read in a thread.

    Args:
        dataset: the one that is connected.
        model: the MODEL that trains on it.
        empty: the CONDITIONING of an empty prompt, if it is not the data set's own.

    Raises:
        ValueError: the data set is encoded for another MODEL; names dataset.
    """

    def __init__(self, dataset: Dataset, model, empty: list | None = None):
        running, latent_format = model_of(model), model.get_model_object("latent_format")
        if BASES[base_of_model(running)].frames_in_rows:
            raise ValueError("dataset: the connected MODEL is trained on videos, and a data set holds pictures; "
                             "connect latents, conditioning and images instead.")
        self.dataset, self.folder, self.ratio = dataset, dataset.folder, running.ratio
        self.worn = dataset.worn
        self.empty = empty or [as_entry(*self.folder.read("captions", dataset.empty))]
        check_caption("empty_conditioning", self.empty[0])

        one_of_size = {row.size: row.picture for row in dataset.rows}
        self._shapes = {size: self.folder.shape("pictures", name, "latent") for size, name in one_of_size.items()}
        for (height, width), shape in self._shapes.items():
            pixels = tuple(self.ratio * side for side in shape[-2:])
            if shape[1] != latent_format.latent_channels or pixels != (height, width):
                raise ValueError(f"dataset: its VAE makes {list(shape)} of a picture of {width}x{height} pixels, which "
                                 "are no latents of the connected MODEL; connect the VAE that belongs to the MODEL.")

        self._reader = ThreadPoolExecutor(1)
        self._ready: dict[int, Sample] = {}
        self._coming: Future | None = None

    def buckets(self) -> list[list[int]]:
        return alike([row.size for row in self.dataset.rows])

    def latent_shape(self, row: int) -> tuple[int, ...]:
        return self._shapes[self.dataset.rows[row].size]

    def read_ahead(self, next_rows: Callable[[], Sequence[int]]) -> None:
        wanted = set(next_rows())
        self._coming = self._reader.submit(lambda: {row: self._read(row) for row in wanted})

    def sample(self, row: int) -> Sample:
        if row not in self._ready and self._coming is not None:
            self._ready, self._coming = self._coming.result(), None
        if row not in self._ready:
            self._ready[row] = self._read(row)
        return self._ready[row]

    def _read(self, row: int) -> Sample:
        names = self.dataset.rows[row]
        tensors, _ = self.folder.read("pictures", names.picture)
        caption = as_entry(*self.folder.read("captions", names.caption))
        return Sample(full(tensors["latent"]), caption, unpacked(tensors["control"]), tensors.get("weight"))


def tell(dataset: Dataset, encoded: int, left_out: LeftOut) -> str:
    """The node's text about a data set; a warning in the log names the pictures that were left out."""
    pictures, sizes = len({row.picture for row in dataset.rows}), len({row.size for row in dataset.rows})
    text = f"{pictures} pictures in {sizes} {'size' if sizes == 1 else 'sizes'}, {encoded} of them encoded just now."
    if left_out.reasons:
        text += f" {len(left_out.reasons)} left out: {left_out}."
        logging.warning("ControlNeXt: %d pictures were left out: %s.", len(left_out.reasons), left_out)
    return text
