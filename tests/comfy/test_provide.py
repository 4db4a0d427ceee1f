"""The files that demo_model/provide.py makes of the trained weights, in the stock nodes."""

import os
from pathlib import Path

import comfy.supported_models
import pytest
import torch
from comfy.sd1_clip import SD1ClipModel
from safetensors.torch import load_file

from demo_model import provide
from demo_model.autoencoder import SD15_SCALE, Autoencoder
from demo_model.world import load_held_out


@pytest.fixture(scope="module")
def checkpoint(run, models_folder):
    """MODEL, CLIP and VAE from the stock loader."""
    provide.provide(Path(os.environ["COMFYUI_PATH"]), models_folder)
    return run("CheckpointLoaderSimple", ckpt_name=provide.CHECKPOINT)


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    """Some drawings as an IMAGE."""
    return torch.from_numpy(load_held_out(provide.WEIGHTS)[0][:8]).float() / 255


def test_the_checkpoint_is_sd15_with_its_text_encoder(checkpoint):
    model, clip, _ = checkpoint
    assert type(model.model.model_config) is comfy.supported_models.SD15
    assert type(clip.cond_stage_model) is SD1ClipModel


def test_other_texts_are_other_directions(run, checkpoint):
    _, clip, _ = checkpoint
    cup, cat, empty = (run("CLIPTextEncode", clip=clip, text=text)[0][0] for text in ("hot beverage", "cat face", ""))
    assert cup.shape == (1, 77, 768)
    assert (torch.cosine_similarity(cup[0, 1:3], cat[0, 1:3], dim=-1) < 0.5).all()
    torch.testing.assert_close(cup[0, 0], empty[0, 0])


def test_the_vae_computes_what_the_narrow_one_in_the_repository_does(run, checkpoint, drawings):
    _, _, vae = checkpoint
    tensors = load_file(provide.source(provide.CHECKPOINT))
    narrow = Autoencoder()
    found = narrow.load_state_dict({name.removeprefix(provide.VAE): tensor.float() for name, tensor in tensors.items()
                                    if name.startswith(provide.VAE)}, strict=False)
    assert found.unexpected_keys == ["vae_scale", "vae_shift"] and not found.missing_keys
    with torch.no_grad():
        expected = narrow(drawings.movedim(-1, 1), torch.tensor(0.0))[0].movedim(1, -1).clamp(0, 1)
    shown = run("VAEDecode", vae=vae, samples=run("VAEEncode", vae=vae, pixels=drawings))
    torch.testing.assert_close(shown, expected, atol=0.02, rtol=0)


def test_the_unet_gets_latents_of_deviation_1(run, checkpoint, drawings):
    latents = run("VAEEncode", vae=checkpoint[2], pixels=drawings)["samples"]
    assert (latents * SD15_SCALE).std() == pytest.approx(1, abs=0.25)
