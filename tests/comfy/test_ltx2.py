"""What is LTX-2's alone: ComfyUI packs the latents of a video and of its sound into one row."""

import comfy.nested_tensor
import pytest
import torch
from sampling import TRAINING, cond, latent, relative, sample
from tokens import by_hand, drawn, picture_for
from trainings import RATE, samples, train_on

SETTINGS = TRAINING | dict(steps=2, learning_rate=RATE, unet_learning_rate=RATE, filename_prefix="ltx2")


@pytest.fixture(scope="module")
def base() -> str:
    return "ltx2"


def unread_prompt(model, seed: int) -> list:
    """One as the text encoder makes it, which the model's connectors have yet to read."""
    return cond(model, context=torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("silent", [True, False])
def test_a_video_is_controlled_as_by_hand_with_and_without_a_sound(base, model, control, controlnext, silent):
    image, prompts = picture_for(base), [unread_prompt(model, seed) for seed in range(2)]
    with by_hand(base, model, controlnext, {0: [(image, 1.0)]}):
        expected = drawn(base, model, *prompts, silent=silent)
    assert relative(drawn(base, *control(model, controlnext, image, *prompts), silent=silent), expected) <= 5e-5
    assert relative(drawn(base, model, *prompts, silent=silent), expected) > 1e-2


def test_training_takes_prompts_that_the_connectors_have_yet_to_read(run, base, model):
    data = samples(base, model) | {"conditioning": [unread_prompt(model, 0)]}
    trained, losses, *_ = train_on(run, model, data, SETTINGS)
    assert len(losses["loss"]) == 2 and trained.unet_differences


def test_one_latent_frame_with_a_sound_is_a_picture_and_a_batch_of_them_takes_an_image_each(base, model, control,
                                                                                            controlnext):
    images, frame = picture_for(base, 1, 2), latent(base, 2, 4, 4)[:, :, :1]
    together = sample(*control(model, controlnext, images), frame, steps=1)
    second = sample(*control(model, controlnext, images[1:]), frame, steps=1)
    assert relative(second[1], together[1]) <= 5e-5
    assert relative(second[0], together[0]) > 1e-2


def test_the_sound_enters_the_first_block_untouched(base, model, control, controlnext):
    entered = []
    hook = model.model.diffusion_model.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args: entered.append([stream.clone() for stream in args[0]]))
    try:
        drawn(base, model, cfg=1.0)
        drawn(base, *control(model, controlnext, picture_for(base)), cfg=1.0)
    finally:
        hook.remove()
    (video, sound), (controlled, same) = entered
    assert sound.numel() and torch.equal(sound, same)
    assert not torch.isclose(video, controlled).all(-1).any()


def test_memory_is_told_for_the_video_alone(base, model, control, controlnext, asked):
    """As much with a sound as without one, beside what ComfyUI asks for the model itself."""
    controlled = control(model, controlnext, picture_for(base))
    for silent in (True, False):
        drawn(base, model, silent=silent)
        drawn(base, *controlled, silent=silent)
    silently, with_sound = asked[1] - asked[0], asked[3] - asked[2]
    assert silently > 0
    assert with_sound == pytest.approx(silently)  # ComfyUI adds parts of bytes


def test_a_latent_with_a_sound_is_refused_by_a_training(run, base, model):
    data = samples(base, model)
    video = data["latents"][0]["samples"]
    data["latents"] = [{"samples": comfy.nested_tensor.NestedTensor((video, torch.zeros(1, 8, 3, 16)))}]
    with pytest.raises(ValueError, match=r"^latents: a LATENT holds a video and its sound, .*Separate AV Latent\.$"):
        train_on(run, model, data, SETTINGS)
