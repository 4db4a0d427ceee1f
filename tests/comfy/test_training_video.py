"""Train ControlNeXt on videos, for SVD; and the scale that the families of the middle learn, SD1.5's too."""

import re
from pathlib import Path

import comfy.cli_args
import comfy.utils
import folder_paths
import pytest
import torch
from models import NARROW, small_unet
from sampling import FAMILIES, TRAINING, cond, one_forward, picture, sample
from trainings import train_on, weights

from controlnext_core.families import FAMILIES as TABLE
from controlnext_core.module import new_module
from controlnext_core.training import draw_rows

FRAMES = 2
OUTPUT = Path(folder_paths.get_output_directory())
SETTINGS = TRAINING | dict(steps=1, learning_rate=3e-3, unet_learning_rate=3e-3, filename_prefix="video")


@pytest.fixture(scope="module")
def models():
    with torch.inference_mode():  # as a loader node makes them; what autograd saves must be copied
        return {base: small_unet(base, model_channels=64) for base in ("svd", "sd15")}


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data(base: str, count: int = 1) -> dict:
    """Videos for SVD, pictures for others."""
    frames = FRAMES if base == "svd" else 1
    return {"latents": [{"samples": noise(frames, 4, 8, 8, seed=seed)} for seed in range(count)],
            "images": [picture(seed, frames) for seed in range(count)]}


def prompt(model, base: str, seed: int = 0) -> list:
    """As SVD_img2vid_Conditioning makes it."""
    extra = dict(concat_latent_image=noise(1, 4, 8, 8, seed=9), motion_bucket_id=100, fps=7, augmentation_level=0.1)
    return cond(model, seed, **(extra if base == "svd" else {}))


@pytest.fixture
def small(pack):
    """small(family): an untrained CONTROLNEXT for the narrow models."""
    def make(family: str):
        widths = dict(width_1=16, width_2=32, width_3=32) if "mid" in family else {}
        stem = {} if family == "sd15_mid" else {key: value for key, value in NARROW.items() if "width_" not in key}
        module = new_module(TABLE[family], seed=2, out=64, **({**stem, **widths} if widths else NARROW))
        weights = {**module.state_dict(), **({"scale": torch.tensor(0.9)} if widths else {})}
        return pack("nodes.runtime.loaded").trained_controlnext(weights, family, "small", {})
    return make


@pytest.fixture
def train(run, small, models):
    """train(family, **settings): the node's outputs, on one fixed video or picture."""
    def run_training(family, count=1, **settings):
        base = FAMILIES[family]
        inputs = {"conditioning": [prompt(models[base], base, seed) for seed in range(count)], **data(base, count)}
        inputs |= {name: settings.pop(name) for name in list(settings) if name in inputs}
        return train_on(run, models[base], inputs, {"controlnext": small(family), **SETTINGS, **settings})
    return run_training


@pytest.mark.parametrize("family", ["svd", "svd_padded", "svd_mid", "sd15_mid"])
def test_training_lowers_the_loss_and_reaches_every_tensor(train, models, small, family):
    model = models[FAMILIES[family]].model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untrained = train(family, steps=6, learning_rate=0.0, unet_learning_rate=0.0)[1]["loss"]
    controlnext, loss_map, _, controlled = train(family, steps=6)
    assert sum(loss_map["loss"][3:]) < 0.9 * sum(untrained[3:])  # of the same noise and timesteps
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trained, start = weights(controlnext), weights(small(family))
    assert not [name for name, value in trained.items() if torch.equal(value, start.get(name, torch.zeros(())))]
    assert all(value.any() for value in controlnext.unet_differences.values())
    assert len(controlled.patches) == len(controlnext.unet_differences) > 0


def test_the_loss_is_edm_s_at_log_normal_noise_and_each_frame_has_its_own_control(train, models, small, apply):
    """Of two videos, whose losses a step takes the mean of."""
    model, sigmas = models["svd"], []
    losses = train("svd_padded", 2, steps=2, batch_size=2, learning_rate=0.0, unet_learning_rate=0.0)[1]["loss"]
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    videos, found = data("svd", 2), []
    for _ in range(4):
        (row,) = draw_rows([[0, 1]], 1, generator)
        sigmas.append((0.7 + 1.6 * torch.randn(1, generator=generator)).exp())
        clean = 0.18215 * videos["latents"][row]["samples"]
        x = clean + sigmas[-1] * torch.randn(clean.shape, generator=generator)
        torch.rand(1, generator=generator)  # of a caption that is not dropped
        controlled = apply(model, small("svd_padded"), videos["images"][row])
        square = sigmas[-1] ** 2 + 1
        out = one_forward(controlled, prompt(model, "svd", row), x / square ** 0.5, float(sigmas[-1]))
        denoised = x / square - out * sigmas[-1] / square ** 0.5
        found.append(float((denoised - clean).square().mean() * square / sigmas[-1] ** 2))
    assert losses == pytest.approx([(found[0] + found[1]) / 2, (found[2] + found[3]) / 2], rel=1e-4)
    assert len(set(sigmas)) == 4


@pytest.mark.parametrize("family", ["svd_padded", "svd_mid"])
def test_a_resumed_training_equals_an_uninterrupted_one(train, family):
    settings = dict(steps=4, save_every=2, ema=0.9, filename_prefix=f"video_{family}")
    whole = train(family, **settings)
    kept = min((OUTPUT / "controlnext_training").glob(f"video_{family}_*_step_2.pt")).name
    again = train(family, **settings, resume_from=kept)
    assert again[1] == whole[1]
    ours, expected = weights(again[0]), weights(whole[0])
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("family", ["svd_padded", "svd_mid"])
def test_saved_files_draw_the_same_loaded(train, run, apply, models, models_folder, family):
    trained, _, _, with_unet = train(family)
    run("ControlNeXtSave", controlnext=trained, filename_prefix=f"controlnext/{family}_video")
    for file in (OUTPUT / "controlnext" / f"{family}_video_00001_").iterdir():
        file.rename(models_folder / "controlnext" / f"video_{family}_{file.name}")
    loaded = run("ControlNeXtLoader", controlnext_name=f"video_{family}_controlnet.safetensors", variant="auto")
    assert loaded.variant == family
    assert loaded.loaded.checkpoint.scale == trained.loaded.checkpoint.scale
    again = run("ControlNeXtUNetLoader", model=models["svd"], unet_name=f"video_{family}_unet.safetensors",
                strength=1.0, mode="auto")
    positive, start = prompt(models["svd"], "svd"), torch.zeros(FRAMES, 4, 8, 8)
    ours, expected, plain = (sample(apply(model, controlnext, picture(0, FRAMES)), positive, positive, start, steps=1)
                             for model, controlnext in ((again, loaded), (with_unet, trained),
                                                        (models["svd"], loaded)))
    assert torch.equal(ours, expected) and not torch.equal(ours, plain)


def test_a_new_one_is_as_the_reference_trains_it_and_its_preview_the_first_frame(train, monkeypatch):
    previews = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, node_id=None: previews.append(preview))
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    trained = train("svd_padded", controlnext=None, trainable="module", preview_every=1)[0]
    assert trained.variant == "svd_padded"
    assert [preview[1].size for preview in previews] == [(8, 8)]


BAD = {
    "images: there are 1 batches of control images for 2 latents; connect one batch with an image for each frame of "
    "each video, in the same order.": dict(images=[picture(0, FRAMES)]),
    "images: there are 1 control images for a video of 2 frames; connect one for each frame.":
        dict(images=[picture(0, FRAMES), picture(1)]),
    "conditioning: there are 3 captions for 2 latents; connect one for each video, or one for all.":
        dict(conditioning=[["one"], ["two"], ["three"]]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_inputs_are_one_clear_sentence(train, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train("svd_padded", 2, **BAD[message])
