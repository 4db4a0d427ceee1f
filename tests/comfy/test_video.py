"""The stock SVD graph under control, from ImageOnlyCheckpointLoader to VAEDecode, on a small checkpoint."""

import functools

import pytest
import svd_files
import torch

FRAMES = 3
FAMILIES = ("svd", "svd_padded", "svd_mid")


@pytest.fixture(scope="module")
def loaded(run, models_folder):
    """(MODEL, CLIP_VISION, VAE), the vision encoder with two of its 32 layers, which is quicker."""
    svd_files.write_checkpoint(models_folder / "checkpoints")
    model, vision, vae = run("ImageOnlyCheckpointLoader", ckpt_name=svd_files.CHECKPOINT)
    del vision.model.vision_model.encoder.layers[2:]
    return model, vision, vae


@pytest.fixture(scope="module")
def conditioning(run, loaded):
    """(positive, negative, latent)"""
    return run("SVD_img2vid_Conditioning", clip_vision=loaded[1], init_image=noise(1), vae=loaded[2], width=64,
               height=64, video_frames=FRAMES, motion_bucket_id=128, fps=7, augmentation_level=0.02)


@pytest.fixture(scope="module")
def apply(run, goldens, models_folder):
    def apply_node(model, family, image, **changes):
        name = f"{family}_video.safetensors"
        if not (models_folder / "controlnext" / name).exists():
            svd_files.write_controlnext(models_folder / "controlnext", goldens.state_dict(family), name)
        controlnext = run("ControlNeXtLoader", controlnext_name=name, variant=family)
        return run("ControlNeXtApply", model=model, controlnext=controlnext, image=image,
                   **{"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **changes})
    return apply_node


@pytest.fixture(scope="module")
def latents(run, conditioning):
    """latents(model): what KSampler makes under linear guidance."""
    positive, negative, latent = conditioning

    def sample(model, cfg=3.0):
        guided = run("VideoLinearCFGGuidance", model=model, min_cfg=1.0)
        return run("KSampler", model=guided, seed=1, steps=1, cfg=cfg, sampler_name="euler", scheduler="karras",
                   positive=positive, negative=negative, latent_image=latent, denoise=1.0)["samples"]
    return sample


def noise(frames: int, size: int = 64) -> torch.Tensor:
    return torch.rand(frames, size, size, 3, generator=torch.Generator().manual_seed(frames))


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.std())


@pytest.fixture(scope="module")
def plain(latents, loaded):
    return latents(loaded[0])


@pytest.fixture(scope="module")
def controlled(apply, latents, loaded):
    """controlled(family): the latents under control."""
    return functools.cache(lambda family: latents(apply(loaded[0], family, noise(FRAMES))))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_graph_makes_a_controlled_video(run, apply, latents, loaded, plain, controlled, family):
    assert relative(controlled(family), plain) > 1e-3
    assert torch.equal(latents(apply(loaded[0], family, noise(FRAMES), strength=0.0)), plain)
    video = run("VAEDecode", samples={"samples": controlled(family)}, vae=loaded[2])
    assert video.shape == (FRAMES, 64, 64, 3)
    assert torch.isfinite(video).all()


def test_the_variants_of_one_file_make_different_videos(controlled):
    """svd and svd_padded files have equal names and shapes; only the chosen variant tells them apart."""
    assert relative(controlled("svd_padded"), controlled("svd")) > 1e-3


def test_linear_guidance_takes_the_controlled_half_for_the_positive_one(apply, latents, loaded):
    """The guidance grows from 1, where a frame is the positive half's alone, as it is without guidance."""
    model = apply(loaded[0], "svd", noise(FRAMES))
    guided, unguided = latents(model), latents(model, cfg=1.0)
    assert relative(guided[0], unguided[0]) <= 1e-3
    assert relative(guided[-1], unguided[-1]) > 1e-2
