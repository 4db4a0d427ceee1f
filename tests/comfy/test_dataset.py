"""ControlNeXt Dataset: a folder of pictures as people have them, encoded once and trained on from disk."""

import os
from pathlib import Path

import comfy.model_management
import cv2
import folder_paths
import numpy as np
import pytest
import torch
from models import NARROW, small_sd3, small_unet
from PIL import Image
from sampling import TRAINING
from trainings import train_on, weights

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module
from demo_model import provide
from demo_model.bases import BASES

INPUT, OUTPUT = Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory())
SIZE = 64
SETTINGS = TRAINING | dict(steps=3, batch_size=2, learning_rate=1e-3, unet_learning_rate=1e-3,
                           gradient_checkpointing=False, filename_prefix="dataset")


@pytest.fixture(scope="module")
def checkpoint(run, models_folder):
    """(CLIP, VAE) of the demonstration's SD1.5, the CLIP with one of its twelve layers, which is quicker."""
    provide.provide(Path(os.environ["COMFYUI_PATH"]), models_folder)
    _, clip, vae = run("CheckpointLoaderSimple", ckpt_name=BASES["sd15"].checkpoint)
    del clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[1:]
    return clip, vae


def pixels(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A picture (H, W, 3) uint8 with edges."""
    numbers = np.random.default_rng(seed)
    picture = np.full((height, width, 3), numbers.integers(60, 120), np.uint8)
    for _ in range(4):
        top, left = numbers.integers(0, height - 16), numbers.integers(0, width - 16)
        picture[top:top + 16, left:left + 16] = numbers.integers(0, 256, 3)
    return picture


@pytest.fixture
def folder(tmp_path_factory, request):
    """folder({name: picture or bytes}, captions): a new folder in ComfyUI's input folder, by its name there."""
    def make(pictures: dict, captions: dict | None = None, name: str = "pictures") -> str:
        path = Path(tmp_path_factory.mktemp(name, numbered=True))
        link = INPUT / f"{path.parent.name}_{path.name}"
        link.mkdir()
        for file, content in pictures.items():
            (link / file).parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                (link / file).write_bytes(content)
            else:
                Image.fromarray(content).save(link / file)
        for file, text in (captions or {}).items():
            (link / file).write_text(text, encoding="utf-8")
        return link.name
    return make


@pytest.fixture
def make(run, checkpoint):
    """make(folder, **inputs): ControlNeXt Dataset's output."""
    def run_node(name: str, **inputs):
        return run("ControlNeXtDataset", **{"folder": name, "vae": checkpoint[1], "clip": checkpoint[0], "size": SIZE,
                                            "buckets": True, "control": "canny", "mask_threshold": 0.5, **inputs})
    return run_node


@pytest.fixture
def train(run, pack):
    """train(**inputs): the outputs of Train ControlNeXt, on a small UNet that takes the checkpoint's latents."""
    def run_training(**inputs):
        data = {name: inputs.pop(name) for name in ("latents", "conditioning", "images", "dataset") if name in inputs}
        module = new_module(FAMILIES["sd15"], out=64, **NARROW)
        small = pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), "sd15", "small", {})
        return train_on(run, small_unet("sd15"), data, SETTINGS | {"controlnext": small} | inputs)
    return run_training


def cache_of(name: str, kind: str = "pictures") -> dict[str, int]:
    """{encoded file: when it was written}."""
    return {path.name: path.stat().st_mtime_ns for path in (OUTPUT / "controlnext_datasets" / name / kind).iterdir()}


def as_kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half().float()


@pytest.fixture
def lists(run, checkpoint):
    """lists(folder): the same pictures and captions by ComfyUI's own nodes, in half precision as they are kept."""
    def load(name: str) -> dict:
        images, texts = run("LoadImageTextDataSetFromFolder", folder=name)
        order = sorted(range(len(images)), key=lambda index: float(texts[index][-1]))
        images, texts = [images[index] for index in order], [texts[index] for index in order]
        latents, conditioning = run("MakeTrainingDataset", images=images, vae=[checkpoint[1]], clip=[checkpoint[0]],
                                    texts=texts)
        kept = [[[as_kept(cond), {key: as_kept(value) if torch.is_tensor(value) else value
                                  for key, value in more.items()}] for cond, more in one] for one in conditioning]
        return {"latents": [{"samples": as_kept(one["samples"])} for one in latents], "conditioning": kept,
                "images": images}
    return load


def three(seed: int = 0, **changes) -> tuple[dict, dict]:
    """(pictures, captions) whose order by name is that of their captions' last letter."""
    pictures = {"a.png": pixels(seed), "b.png": pixels(seed + 1), "c.png": pixels(seed + 2)}
    return pictures | changes, {"a.txt": "a cat 0", "b.txt": "a dog 1", "c.txt": "a hen 2\n"}


def edges_of(run, images: list) -> list:
    return [run("ControlNeXtCanny", image=image, threshold="auto", low_threshold=100, high_threshold=200)
            for image in images]


def test_it_trains_bit_for_bit_as_the_same_pictures_in_lists(run, make, train, lists, folder, checkpoint):
    name = folder(*three())
    listed = lists(name)
    empty = run("CLIPTextEncode", clip=checkpoint[0], text="")
    empty = [[as_kept(empty[0][0]), {key: as_kept(value) for key, value in empty[0][1].items()}]]
    by_lists = train(**listed | {"images": edges_of(run, listed["images"])}, caption_dropout=0.3,
                     empty_conditioning=empty, steps=5)
    by_disk = train(dataset=[make(name)], caption_dropout=0.3, steps=5)
    assert by_disk[1] == by_lists[1]
    ours, expected = weights(by_disk[0]), weights(by_lists[0])
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in expected)


def test_worn_pictures_are_those_of_super_resolution(make, train, lists, folder):
    name = folder(*three())
    by_lists = train(**lists(name), super_resolution=True)
    assert train(dataset=[make(name, control="degraded picture")])[1] == by_lists[1]


def test_control_images_and_weights_of_the_same_names_come_from_folders(run, make, train, lists, folder):
    name = folder(*three())
    controls = {f"{letter}.webp": pixels(7 + index) for index, letter in enumerate("abc")}
    controls = {file: np.dstack([picture] * 1) for file, picture in controls.items()}
    half_white = np.zeros((SIZE, SIZE), np.uint8)
    half_white[:, :32] = 255
    others = folder({file.replace("webp", "png"): picture for file, picture in controls.items()})
    weighing = folder({f"{letter}.png": half_white for letter in "abc"})
    listed = lists(name)
    images = [torch.from_numpy(picture.astype(np.float32) / 255)[None] for picture in controls.values()]
    mask = torch.from_numpy(half_white.astype(np.float32) / 255)[None]
    weighed = [{**one, "noise_mask": mask} for one in listed["latents"]]
    expected = train(**listed | {"images": images, "latents": weighed})
    assert train(dataset=[make(name, control_folder=others, weights_folder=weighing)])[1] == expected[1]
    assert train(dataset=[make(name, control_folder=others)])[1] != expected[1]


def test_masks_are_white_from_a_brightness_on(make, folder, pack):
    picture = np.full((SIZE, SIZE, 3), 100, np.uint8)
    picture[:, 20:] = 200
    data = make(folder({"a.png": picture}), control="mask", mask_threshold=0.6)
    control = pack("nodes.training.encoded").unpacked(data.folder.read("pictures", data.rows[0].picture)[0]["control"])
    assert not control[:, :, :20].any() and (control[:, :, 20:] == 1).all()


def test_pictures_of_other_shapes_go_into_buckets_of_about_as_many_pixels(make, folder, run, train):
    name = folder({"wide.png": pixels(0, 96, 192), "tall.png": pixels(1, 300, 100), "square.png": pixels(2, 50, 50)})
    assert {row.size for row in make(name, size=128).rows} == {(64, 192), (192, 64), (128, 128)}
    assert {row.size for row in make(name, size=128, buckets=False).rows} == {(128, 128)}
    assert {row.size for row in make(name, size=96).rows} == {(64, 128), (160, 64), (96, 96)}
    assert train(dataset=[make(name, size=96)], steps=6)[2] == 6


def test_a_folder_whose_name_begins_with_a_number_counts_so_often(make, folder):
    data = make(folder({"3_cats/a.png": pixels(0), "dogs/b.png": pixels(1), "c.png": pixels(2)}))
    names = [row.picture for row in data.rows]
    assert sorted(names.count(name) for name in set(names)) == [1, 1, 3]


def test_it_goes_on_where_it_was_stopped_and_encodes_only_what_changed(make, folder, run, checkpoint, monkeypatch):
    name, encode = folder(*three()), checkpoint[1].encode
    asked = []

    def stop_at_the_third(self_or_pixels):
        asked.append(None)
        if len(asked) == 3:  # the first is the probe
            comfy.model_management.interrupt_current_processing()
        return encode(self_or_pixels)
    monkeypatch.setattr(checkpoint[1], "encode", stop_at_the_third)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        make(name)
    assert 0 < len(cache_of(name)) < 3
    monkeypatch.undo()
    first = cache_of(name)
    whole = make(name)
    after = cache_of(name)
    assert len(after) == 3 and first.items() <= after.items()

    make(name)
    assert cache_of(name) == after
    Image.fromarray(pixels(9)).save(INPUT / name / "b.png")
    changed = make(name)
    assert len(cache_of(name).items() - after.items()) == 1 and changed.rows[0] == whole.rows[0]

    before, captions = cache_of(name), cache_of(name, "captions")
    (INPUT / name / "a.txt").write_text("something else")
    recaptioned = make(name)
    assert cache_of(name) == before and len(cache_of(name, "captions").items() - captions.items()) == 1
    assert [row.picture for row in recaptioned.rows] == [row.picture for row in changed.rows]

    assert not {row.picture for row in make(name, size=128).rows} & {row.picture for row in changed.rows}
    other = checkpoint[0].clone()
    monkeypatch.setattr(other, "encode_from_tokens_scheduled", lambda tokens: [
        [1.1 * cond, more] for cond, more in checkpoint[0].encode_from_tokens_scheduled(tokens)])
    by_other = make(name, clip=other)
    assert [row.picture for row in by_other.rows] == [row.picture for row in recaptioned.rows]
    assert not {row.caption for row in by_other.rows} & {row.caption for row in recaptioned.rows}


def test_another_vae_encodes_anew(make, folder, checkpoint, monkeypatch):
    name, encode = folder(*three()), checkpoint[1].encode
    first = make(name)
    monkeypatch.setattr(checkpoint[1], "encode", lambda pixels: 1.01 * encode(pixels))
    assert not {row.picture for row in make(name).rows} & {row.picture for row in first.rows}


def picture_files() -> dict[str, tuple]:
    """{file: (what is written, what is to be read: (H, W, 3) in [0, 1], or None where it is to be left out)}."""
    rgb = pixels(3, 40, 60)
    smooth = cv2.resize(np.linspace(0, 255, 60).astype(np.uint8)[None], (60, 40))
    deep = (smooth.astype(np.uint16) * 257)
    with_alpha = np.dstack([rgb, np.full((40, 60), 255, np.uint8)])
    with_alpha[:, :30, 3] = 0
    on_white = rgb.copy()
    on_white[:, :30] = 255
    gray = rgb[..., 0]
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.fromarray(rgb).quantize(32)
    cut = _bytes(Image.fromarray(pixels(5, 400, 400)), "jpeg")
    return {
        "rgb.png": (Image.fromarray(rgb), rgb), "gray.png": (Image.fromarray(gray), np.dstack([gray] * 3)),
        "16bit.png": (Image.fromarray(deep), np.dstack([smooth] * 3)),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "alpha.png": (Image.fromarray(with_alpha), on_white),
        "alpha.webp": (_bytes(Image.fromarray(with_alpha), "webp", lossless=True), on_white),
        "bits.png": (Image.fromarray(gray > 100), np.dstack([np.uint8(gray > 100) * 255] * 3)),
        "turned.png": (_bytes(Image.fromarray(rgb), "png", exif=exif), np.rot90(rgb, -1)),
        "cmyk.jpg": (_bytes(Image.fromarray(np.full((40, 60, 3), (200, 50, 20), np.uint8)).convert("CMYK"), "jpeg"),
                     np.full((40, 60, 3), (200, 50, 20), np.uint8)),
        "nothing.png": (b"", None), "text.jpg": (b"no picture at all", None), "cut.jpg": (cut[:len(cut) // 2], None),
    }


def _bytes(image: Image.Image, kind: str, **options) -> bytes:
    import io
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("file", picture_files())
def test_odd_pictures_are_read_right_or_left_out(pack, file, tmp_path):
    content, expected = picture_files()[file]
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    module = pack("nodes.training.pictures")
    if expected is None:
        with pytest.raises(Exception):  # noqa: B017  whatever Pillow raises
            module.read_picture(path)
        return
    read = module.read_picture(path)
    assert read.shape == (1, *expected.shape) and module.size_of(path) == expected.shape[:2]
    assert np.abs(255 * read[0].numpy() - expected).max() <= (4 if file == "cmyk.jpg" else 0.6)


def test_what_cannot_be_read_or_lacks_its_control_is_named_in_one_warning(make, folder, caplog):
    files = {file: content if isinstance(content, bytes) else np.asarray(content.convert("RGB"))
             for file, (content, _) in picture_files().items() if file.endswith(("thing.png", "text.jpg", "rgb.png"))}
    controls = folder({"rgb.png": pixels(0), "nothing.png": pixels(1), "text.jpg": pixels(2)})
    data = make(folder(files | {"lonely.png": pixels(4)}), control_folder=controls)
    assert len(data.rows) == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"
                  and "left out" in record.getMessage()]
    assert "3 pictures were left out" in warning
    assert all(name in warning for name in ("nothing (cannot be read", "text (cannot be read",
                                            "lonely (nothing of its name in control_folder)"))


def test_a_damaged_file_of_the_cache_is_one_sentence(make, train, folder):
    data = make(folder(*three()))
    for row in data.rows:
        Path(data.folder.file("pictures", row.picture)).write_bytes(b"damaged")
    data = make(folder(*three()))
    for row in data.rows:
        path = Path(data.folder.file("pictures", row.picture))
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="dataset: .* is gone or damaged .*; delete it and queue the graph again"):
        train(dataset=[data])


BAD = {
    "folder: there is no picture in .* that can be trained on; put": dict(pictures={}),
    "folder: there is no picture in .*; left out: a .cannot be read": dict(pictures={"a.png": b""}),
    "size: 8 came in where a whole number from 64": dict(size=8),
    "control: 'lines' came in where one of": dict(control="lines"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_inputs_are_one_clear_sentence(make, folder, message):
    given = dict(BAD[message])
    name = folder(given.pop("pictures", {"a.png": pixels(0)}))
    with pytest.raises(ValueError, match=message):
        make(name, **given)


def test_a_data_set_for_another_model_or_nothing_at_all_is_refused(run, make, train, folder):
    data = make(folder({"a.png": pixels(0)}))
    for model, message in ((small_sd3(), "dataset: its VAE makes .* no latents of the connected MODEL"),
                           (small_unet("svd"), "dataset: the connected MODEL is trained on videos")):
        with pytest.raises(ValueError, match=message):
            train_on(run, model, {"dataset": [data]}, SETTINGS)
    with pytest.raises(ValueError, match="latents: nothing is connected; connect .* or a dataset"):
        train()


def test_the_node_runs_again_when_a_file_changes(comfy_nodes, folder):
    name = folder(*three())
    fingerprint = comfy_nodes["ControlNeXtDataset"].fingerprint_inputs
    before = fingerprint(folder=name, control_folder="none")
    assert fingerprint(folder=name, control_folder="none") == before
    (INPUT / name / "a.txt").write_text("other")
    assert fingerprint(folder=name, control_folder="none") != before


def test_captions_are_read_whatever_wrote_them(pack, tmp_path):
    picture = pack("nodes.training.pictures").Picture("a", str(tmp_path / "a.png"))
    assert picture.caption == ""
    for content in ("\ufeffa hen\r\n".encode(), b"  a hen  "):
        (tmp_path / "a.txt").write_bytes(content)
        assert picture.caption == "a hen"
    (tmp_path / "a.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    assert picture.caption.startswith("ein K")


def test_large_numbers_are_kept_too(pack):
    encoded = pack("nodes.training.encoded")
    tensor = torch.tensor([1e6, 1.0])
    assert torch.allclose(encoded.full(encoded.half(tensor)), tensor, rtol=1e-2)
    assert torch.equal(encoded.half(torch.tensor([1, 2])), torch.tensor([1, 2]))
