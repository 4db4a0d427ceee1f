"""The files that demo_model/provide.py makes of the trained weights, in the stock nodes."""

import os
from pathlib import Path

import comfy.supported_models
import pytest
import torch
from comfy.sd1_clip import SD1ClipModel
from comfy.text_encoders.sd3_clip import SD3ClipModel
from safetensors.torch import load_file

from demo_model import provide
from demo_model.autoencoder import load_narrow
from demo_model.bases import BASES
from demo_model.drawings import SIZE, load_held_out
from demo_model.measure import Demonstration
from demo_model.text import Texts, encode_texts
from demo_model.transformer import new_transformer, predict


@pytest.fixture(scope="module", params=provide.MADE, ids=lambda base: base.name)
def base(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(run, models_folder, base):
    """MODEL, CLIP and VAE from the stock loader."""
    provide.provide(Path(os.environ["COMFYUI_PATH"]), models_folder)
    return run("CheckpointLoaderSimple", ckpt_name=base.checkpoint)


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    """Some drawings as an IMAGE."""
    return torch.from_numpy(load_held_out(provide.WEIGHTS)[0][:8]).float() / 255


def test_the_checkpoint_is_what_its_base_is_with_its_text_encoder(base, checkpoint):
    model, clip, _ = checkpoint
    config, encoder = {"sd15": (comfy.supported_models.SD15, SD1ClipModel),
                       "sd3": (comfy.supported_models.SD3, SD3ClipModel)}[base.name]
    assert type(model.model.model_config) is config
    assert isinstance(clip.cond_stage_model, encoder)


def test_other_texts_are_other_directions(run, base, checkpoint):
    _, clip, _ = checkpoint
    (cup, pooled_cup), (cat, pooled_cat), (empty, _) = (
        (context, extra["pooled_output"]) for context, extra in
        (run("CLIPTextEncode", clip=clip, text=text)[0] for text in ("hot beverage", "cat face", "")))
    assert cup.shape == (1, 77, {"sd15": 768, "sd3": 4096}[base.name])
    assert (torch.cosine_similarity(cup[0, 1:3], cat[0, 1:3], dim=-1) < 0.5).all()
    torch.testing.assert_close(cup[0, 0], empty[0, 0])
    assert (torch.cosine_similarity(pooled_cup, pooled_cat) < 0.9) == base.pooled_words


def test_the_vae_computes_what_the_narrow_one_in_the_repository_does(run, base, checkpoint, drawings):
    narrow = provide.part(load_file(provide.source(base.checkpoint)), provide.VAE)
    assert sum(tensor.numel() for tensor in narrow.values()) < sum(p.numel() for p in checkpoint[2].first_stage_model
                                                                   .parameters()) / 2
    with torch.no_grad():
        expected = load_narrow(narrow)(drawings.movedim(-1, 1), torch.tensor(0.0))[0].movedim(1, -1).clamp(0, 1)
    shown = run("VAEDecode", vae=checkpoint[2], samples=run("VAEEncode", vae=checkpoint[2], pixels=drawings))
    torch.testing.assert_close(shown, expected, atol=0.02, rtol=0)


def test_the_denoiser_gets_latents_of_deviation_1(run, checkpoint, drawings):
    latents = run("VAEEncode", vae=checkpoint[2], pixels=drawings)["samples"]
    assert checkpoint[0].model.process_latent_in(latents).std() == pytest.approx(1, abs=0.25)


def test_the_transformer_is_trained_with_every_token_once_as_comfyui_runs_it_with_all(run, models_folder):
    base = BASES["sd3"]
    provide.provide(Path(os.environ["COMFYUI_PATH"]), models_folder)
    model, clip, _ = run("CheckpointLoaderSimple", ckpt_name=base.checkpoint)
    captions = ["red apple", "", "cat cat face"]
    transformer = new_transformer(base).requires_grad_(False)
    tensors = load_file(provide.source(base.checkpoint))
    transformer.load_state_dict(provide.part(tensors, provide.UNET))
    x, levels = torch.randn(3, base.channels, 12, 12), torch.tensor([0.2, 0.5, 0.9])
    trained = predict(transformer, x, levels, Texts(*encode_texts(captions, base))[torch.arange(3)])
    encoded = [run("CLIPTextEncode", clip=clip, text=caption)[0] for caption in captions]
    with torch.no_grad():
        used = model.model.diffusion_model.float()(
            x, levels * 1000, context=torch.cat([context for context, _ in encoded]),
            y=torch.cat([extra["pooled_output"] for _, extra in encoded]))
    torch.testing.assert_close(trained, used, atol=5e-3, rtol=0)


def test_the_stock_nodes_draw_what_is_asked_for_on_white_paper(run, models_folder, base):
    provide.provide(Path(os.environ["COMFYUI_PATH"]), models_folder)
    captions = ["hot pepper", "jigsaw puzzle piece"]
    drawn = Demonstration(run, torch.zeros(2, SIZE, SIZE, 3).byte().numpy(), captions, cfg=3.0, base=base.name).draw(1)
    pepper, piece = drawn
    assert drawn[:, :4, :4].mean() > 0.95
    assert (pepper[..., 0] - pepper[..., 1]).mean() > 0.1
    assert (piece[..., 1] - piece[..., 0]).mean() > 0.05
