"""Control of the videos of transformers: a latent frame stands for the first image or for several."""

from types import SimpleNamespace

import pytest
import torch
from sampling import cond, conds, latent, one_call_each, relative, sample
from tokens import BASES, VIDEOS, by_hand, drawn, entering, picture_for


@pytest.fixture(scope="module", params=VIDEOS)
def base(request) -> str:
    return request.param


def empty(base: str, frames: int) -> torch.Tensor:
    one = latent(base, 1, *[4 * BASES[base].patch] * 2)[:, :, :1]
    return one.repeat_interleave(frames, 2)


def images_of(base: str, frames: int) -> torch.Tensor:
    """A control image for each frame of a video of so many latent frames."""
    return picture_for(base, 1, BASES[base].images * (frames - 1) + 1)


@pytest.mark.versions
@pytest.mark.parametrize("missing", [0, 2])
def test_a_latent_frame_gets_the_mean_of_the_images_that_it_stands_for(base, model, control, controlnext, missing):
    """Where images are missing they start again with the first."""
    frames = images_of(base, 2)[missing:]
    with by_hand(base, model, controlnext, {0: [(frames, 1.0)]}):
        expected = drawn(base, model)
    assert relative(drawn(base, *control(model, controlnext, frames)), expected) <= 5e-5
    assert relative(drawn(base, *control(model, controlnext, frames[:1])), expected) > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_context_windows_of_a_video_get_their_own_frames_control(run, base, model, control, controlnext, causal):
    frames = images_of(base, 5)
    windowed = run("ContextWindowsManual", model=model, context_length=3, context_overlap=1, dim=2, freenoise=False,
                   context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="flat",
                   causal_window_fix=causal)
    windows = [[0, 1, 2], [1, 2, 3, 4] if causal else [2, 3, 4]]
    with by_hand(base, model, controlnext, {0: [(frames, 1.0)]}, windows=windows):
        expected = sample(windowed, *conds(model), empty(base, 5), steps=1)
    assert relative(sample(*control(windowed, controlnext, frames), empty(base, 5), steps=1), expected) <= 5e-5
    assert relative(sample(windowed, *conds(model), empty(base, 5), steps=1), expected) > 1e-2


def test_a_mask_of_a_video_is_the_mean_of_those_of_a_frame(base, model, apply, controlnext):
    count, entered = BASES[base].images + 1, []
    masks = torch.zeros(count, 64, 64)
    masks[1:1 + BASES[base].images // 2, :, 32:] = 1.0
    with entering(base, model, 0, lambda tokens, _: entered.append(tokens.unflatten(1, (2, 4, 4)).clone())):
        image = picture_for(base)
        for one in (model, apply(model, controlnext, image), apply(model, controlnext, image, mask=masks)):
            drawn(base, one, cfg=1.0)
    plain, full, masked = (tokens[0] for tokens in entered)
    assert torch.equal(masked[0], plain[0])
    assert torch.equal(masked[1, :, :2], plain[1, :, :2])
    assert torch.allclose(masked[1, :, 2:], (plain[1, :, 2:] + full[1, :, 2:]) / 2, atol=1e-5)


def test_an_area_of_a_video_gets_its_frames_control(run, base, model, control, controlnext, monkeypatch):
    """Two areas, of other frames each, in one call of the transformer."""
    frames, prompt = images_of(base, 4), conds(model)[0]
    areas = [run("ConditioningSetAreaPercentageVideo", conditioning=prompt, temporal=0.5, height=1.0, width=0.5,
                 z=start, y=0.0, x=0.5, strength=1.0) for start in (0.0, 0.5)]
    prompt = [*areas[0], *areas[1]]
    options = dict(steps=1, silent=True)  # ComfyUI has no areas beside a sound
    together = sample(*control(model, controlnext, frames, prompt, prompt), empty(base, 4), **options)
    one_call_each(monkeypatch, model)
    half = frames[:, :, BASES[base].side // 2:]
    with by_hand(base, model, controlnext, {0: [(half, 1.0)]}, grid=(4, 2), windows=[[2, 3], [0, 1]]):
        expected = sample(model, prompt, prompt, empty(base, 4), **options)
    assert relative(together, expected) <= 5e-5


def seen(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("base", ["hunyuan_video15", "ltxv", "ltx2"], indirect=True)
def test_control_of_a_video_that_begins_with_a_picture_is_added_as_by_hand(base, model, control, controlnext):
    given = torch.ones(1, 1, 2, 4, 4)
    given[:, :, 0] = 0.0
    extra, options = {
        "hunyuan_video15": (dict(concat_latent_image=seen(1, 32, 2, 4, 4), concat_mask=given,
                                 clip_vision_output=SimpleNamespace(last_hidden_state=seen(1, 9, 1152))), {}),
    }.get(base, ({}, dict(noise_mask=given)))  # each token has a timestep of its own
    prompts, frames = (cond(model, 0, **extra), cond(model, 1, **extra)), images_of(base, 2)
    for place, block in (("tokens", 0), ("block_1", 2)):
        with by_hand(base, model, controlnext, {block: [(frames, 0.8)]}):
            expected = drawn(base, model, *prompts, **options)
        controlled = control(model, controlnext, frames, *prompts, strength=0.8, inject_at=place)
        assert relative(drawn(base, *controlled, **options), expected) <= 5e-5
        assert relative(drawn(base, model, *prompts, **options), expected) > 1e-2


# ComfyUI has no guides in context windows of LTX-Video
@pytest.mark.parametrize("base, windows", [
    ("ltxv", [range(5)]), ("ltx2", [range(5)]), ("ltx2", [range(3), range(2, 5)])], indirect=["base"])
def test_frames_that_guide_a_video_stay_as_they_are(run, base, model, control, controlnext, windows):
    """They are the last ones of its latent."""
    frames, vae = images_of(base, 5), SimpleNamespace(downscale_index_formula=(8, 32, 32),
                                                      encode=lambda pixels: seen(1, 128, 1, 4, 4))
    *prompts, guided = run("LTXVAddGuide", positive=conds(model)[0], negative=conds(model)[1], vae=vae,
                           latent={"samples": empty(base, 5)}, image=picture_for(base, 3), frame_idx=32, strength=1.0)
    windowed = run("ContextWindowsManual", model=model, context_length=len(windows[0]), context_overlap=1, dim=2,
                   freenoise=False, context_schedule="standard_static", context_stride=1, closed_loop=False,
                   fuse_method="flat", causal_window_fix=False)
    latents, options = guided["samples"], dict(steps=1, noise_mask=guided["noise_mask"])
    with by_hand(base, model, controlnext, {0: [(frames, 1.0)]}, windows=windows):
        expected = sample(windowed, *prompts, latents, **options)
    assert latents.shape[2] == 6
    assert relative(sample(*control(windowed, controlnext, frames, *prompts), latents, **options), expected) <= 5e-5
    assert relative(sample(windowed, *prompts, latents, **options), expected) > 1e-2
