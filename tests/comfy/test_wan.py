"""Control of Wan's videos, and training on them: a latent frame stands for the first image or for four."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from models import small_transformer
from sampling import LATENTS, TRAINING, cond, conds, latent, picture, relative, sample
from tokens import BASES, by_hand, drawn, entering, new_controlnext, picture_for, with_reference
from trainings import RATE, running, train_on, weights

OUTPUT = Path(folder_paths.get_output_directory())


@pytest.fixture(scope="module")
def wan():
    return small_transformer("wan")


@pytest.fixture(scope="module")
def for_wan(pack):
    return new_controlnext(pack, "wan")


def test_one_latent_frame_is_a_picture_and_a_batch_of_them_takes_an_image_each(wan, control, for_wan):
    images = picture(1, 2)
    positive, negative = conds(wan)
    alone = torch.zeros(2, 16, 1, 8, 8)
    together = sample(*control(wan, for_wan, images), alone, steps=1)
    model, positive, negative = control(wan, for_wan, images[1:])
    assert relative(sample(model, positive, negative, alone, steps=1)[1], together[1]) <= 5e-5
    assert relative(sample(model, positive, negative, alone, steps=1)[0], together[0]) > 1e-2


def test_a_reference_picture_before_a_video_s_tokens_stays_as_it_is(monkeypatch, control, for_wan):
    monkeypatch.setitem(BASES, "wan", replace(BASES["wan"], fill=1))
    model = small_transformer("wan", in_dim_ref_conv=16)
    prompts, entered = [with_reference("wan", prompt) for prompt in conds(model)], []
    image = picture(0, 1, 64, 96)
    with by_hand("wan", model, for_wan, {0: [(image, 1.0)]}, grid=(4, 6)):
        expected = drawn("wan", model, *prompts, size=(8, 12))
    with entering("wan", model, 0, lambda tokens, _: entered.append(tokens[:, :24].clone())):
        controlled = drawn("wan", *control(model, for_wan, image, *prompts), size=(8, 12))
        drawn("wan", model, *prompts, size=(8, 12))
    assert relative(controlled, expected) <= 5e-5
    assert torch.equal(*entered)


def video(frames: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(1, 16, frames, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_video_is_trained_under_the_control_that_is_applied_to_it(pack, wan, apply):
    with running(pack, "wan", wan, frames=3) as (run, _):
        run.control.images = run.data.batch_images([0])
        x, sigma = video(3), torch.tensor([0.7])
        ours = run.denoise(x, sigma, run.data.batch_conds(wan.model, [0], [False], "cpu"))
        assert ours.requires_grad
        module = {key: value.detach() for key, value in run.control.module.state_dict().items()}
        applied = apply(wan, pack("nodes.runtime.loaded").trained_controlnext(module, "wan", "test", {}), picture(2, 9),
                        inject_at="block_0")
        options = {**applied.model_options["transformer_options"], "wrappers": applied.wrappers}
        with torch.no_grad():
            expected, plain = (applied.model.apply_model(x, sigma, transformer_options=given,
                                                         c_crossattn=cond(wan)[0][0]) for given in (options, {}))
    assert relative(ours.detach(), expected) <= 5e-5
    assert relative(ours.detach(), plain) > 1e-2


@pytest.fixture
def train(run, for_wan):
    """train(model, videos, images, **settings): the node's outputs, with LATENTs and IMAGEs of these tensors."""
    def run_training(model, videos, images, conditioning=None, **settings):
        settings = TRAINING | dict(controlnext=for_wan, steps=1, learning_rate=RATE, unet_learning_rate=RATE,
                                   filename_prefix="wan_video") | settings
        with torch.inference_mode(False):
            data = {"latents": [{"samples": one} for one in videos], "images": images,
                    "conditioning": [conditioning or cond(model)]}
            return train_on(run, model, data, settings)
    return run_training


def test_a_resumed_training_on_videos_equals_an_uninterrupted_one_and_a_batch_is_one_after_the_other(train, wan):
    data = [video(2), video(2, 3)], [picture(0, 5), picture(1, 5)]
    settings = dict(steps=4, save_every=2, ema=0.9)
    whole = train(wan, *data, **settings, batch_size=2)
    kept = min((OUTPUT / "controlnext_training").glob("wan_video_*_step_2.pt")).name
    again = train(wan, *data, **settings, grad_accumulation_steps=2, resume_from=kept)
    assert again[1] == whole[1]
    ours, expected = weights(again[0]), weights(whole[0])
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_pictures_and_videos_are_trained_together_and_frames_that_the_vae_left_out_have_no_control(pack):
    latents = [{"samples": one} for one in (video(1), video(3), video(2), video(1))]
    images = [picture(seed, frames) for seed, frames in enumerate((1, 11, 5, 1))]
    samples = pack("nodes.training.data").Samples(latents, [cond(small_transformer("wan"))], images, None, 8,
                                                  images_a_frame=4)
    assert samples.videos
    assert samples.buckets() == [[0, 1], [2], [3]]
    for row, which in enumerate((0, 3, 1, 2)):
        assert torch.equal(samples.batch_latents([row]), latents[which]["samples"])
        assert torch.equal(samples.batch_images([row]), images[which][:9].movedim(-1, 1))


BAD = {
    "images: there are 3 control images for a video of 9 frames; connect one for each frame.": dict(
        images=[picture(0, 3)]),
    "images: there are 9 batches of control images for 1 latents; connect one batch with an image for each frame of "
    "each video, in the same order.": dict(images=list(picture(0, 9).split(1))),
    "latents: latents of pictures are needed, with 4 dimensions or one frame, but these are [1, 16, 3, 8, 8]; connect "
    "Make Training Dataset or VAE Encode.": dict(base="qwen_image"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_videos_are_answered_in_one_clear_sentence(train, message):
    given = {"base": "wan", "images": [picture(0, 9)], **BAD[message]}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(small_transformer(given["base"]), [video(3)], given["images"])


@pytest.fixture(params=["image to video", "5B"])
def from_picture(request, monkeypatch):
    """(a Wan that animates a picture, its two prompts, the first frame given): 2.1 beside the noise, 2.2 5B in it."""
    model, first = small_transformer(request.param), video(2, 7)
    given = torch.ones(1, 1, 2, 8, 8)
    given[:, :, 0] = 0.0
    if request.param == "5B":  # each frame has a timestep of its own
        monkeypatch.setitem(BASES, "wan", replace(BASES["wan"], ratio=16))
        monkeypatch.setitem(LATENTS, "wan", (48, 2))
        return model, conds(model), {"noise_mask": given}
    seen = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(8))
    extra = dict(concat_latent_image=first, concat_mask=given,
                 clip_vision_output=SimpleNamespace(penultimate_hidden_states=seen))
    return model, (cond(model, 0, **extra), cond(model, 1, **extra)), {}


def test_control_of_a_video_that_begins_with_a_picture_is_added_as_by_hand(from_picture, control, for_wan):
    model, prompts, options = from_picture
    frames = picture_for("wan", 1, 5)
    for place, block in (("tokens", 0), ("block_1", 2)):
        with by_hand("wan", model, for_wan, {block: [(frames, 0.8)]}):
            expected = drawn("wan", model, *prompts, **options)
        controlled = control(model, for_wan, frames, *prompts, strength=0.8, inject_at=place)
        assert relative(drawn("wan", *controlled, **options), expected) <= 5e-5
        assert relative(drawn("wan", model, *prompts, **options), expected) > 1e-2


def test_a_wan_that_animates_pictures_is_trained_on_videos(from_picture, train):
    model, (prompt, _), _ = from_picture
    shape = latent("wan").shape
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    controlnext, loss_map, _, _ = train(model, [latents], [picture_for("wan", 0, 5)], prompt, steps=2)
    assert loss_map["loss"][0] > 0
    assert [name for name, value in weights(controlnext).items() if not value.any()] == []


@pytest.mark.parametrize(("shown", "same"), [(range(5, 13), "full"), (range(5), "plain")])
def test_a_mask_of_a_video_is_cut_to_an_area_s_frames(run, wan, apply, for_wan, shown, same):
    masks, (prompt, _) = torch.zeros(13, 64, 64), conds(wan)
    masks[list(shown)] = 1.0
    prompt = run("ConditioningSetAreaPercentageVideo", conditioning=prompt, temporal=0.5, height=1.0, width=1.0, z=0.5,
                 y=0.0, x=0.0, strength=1.0)
    frames = picture(1, 13)
    full, masked = (apply(wan, for_wan, frames, **given) for given in ({}, {"mask": masks}))
    full, plain, masked = (sample(model, prompt, prompt, torch.zeros(1, 16, 4, 8, 8), steps=1)
                           for model in (full, wan, masked))
    assert relative(masked, {"full": full, "plain": plain}[same]) <= 1e-6
    assert relative(full, plain) > 1e-2
