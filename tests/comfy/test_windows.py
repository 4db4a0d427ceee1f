"""Long videos: every window of ComfyUI's Context Windows, or of AnimateDiff-Evolved, gets its own frames' control."""

import inspect
import sys

import comfy.sample
import comfy.samplers
import pytest
import torch
from models import narrowed, small_unet
from peak_memory import PeakMemory, give_back_memory
from safetensors.torch import save_file
from sampling import cond, sample

from controlnext_core.cross_normalization import fit
from controlnext_core.families import FAMILIES

FRAMES = 10
SIGMA = 3.0
WINDOWS = {None: [list(range(FRAMES))],  # no windows
           False: [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]],  # of 4 frames, 1 of them shared
           True: [[0, 1, 2, 3], [2, 3, 4, 5, 6], [5, 6, 7, 8, 9]]}  # one more before the later ones: the causal fix


@pytest.fixture(scope="module")
def svd():
    return small_unet("svd")


@pytest.fixture(scope="module")
def precise():
    return small_unet("svd", torch.float64)


@pytest.fixture(scope="module")
def controlnexts(run, goldens, models_folder):
    loaded = {}
    for family in ("sd15", "svd", "svd_padded", "svd_mid"):
        name = f"{family}_windows.safetensors"
        save_file(narrowed(goldens.state_dict(family)), models_folder / "controlnext" / name)
        loaded[family] = run("ControlNeXtLoader", controlnext_name=name, variant=family)
    return loaded


@pytest.fixture(scope="module")
def windows(run, comfy_nodes):
    """windows(model, causal): the stock node's windows over the frames, with its causal fix or without; None: none."""
    has_causal_fix = "causal_window_fix" in inspect.signature(comfy_nodes["ContextWindowsManual"].execute).parameters

    def windows_node(model, causal=False, length=4, overlap=1, dim=0):
        if causal is None:
            return model
        if causal and not has_causal_fix:
            pytest.skip("this ComfyUI has no causal_window_fix")
        causal = {"causal_window_fix": causal} if has_causal_fix else {}
        return run("ContextWindowsManual", model=model, context_length=length, context_overlap=overlap,
                   context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="flat", dim=dim,
                   freenoise=False, **causal)
    return windows_node


def random(*shape, seed=0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def video(frames=FRAMES, size=64) -> torch.Tensor:
    return random(frames, size, size, 3)


def image_latents(frames=FRAMES) -> torch.Tensor:
    return random(frames, 4, 8, 8, seed=1)


def unet_calls(model, latent, concat=None, cfg=1.0) -> list[dict]:
    """What every call of the UNet got and gave in one step of a sampler on the noisy ``latent``."""
    calls = []

    def note(module, args, kwargs, output):
        options = kwargs["transformer_options"]
        features, weights = next(iter(options["controlnext_ready"].values())).added
        calls.append({"timestep": float(args[1][0]), "features": features[0], "weights": weights, "output": output,
                      "num_video_frames": kwargs.get("num_video_frames"), "cond_or_uncond": options["cond_or_uncond"]})

    def sampler(apply, _, sigmas, extra_args=None, **__):
        apply(latent, sigmas[:1].expand(len(latent)), **extra_args)
        return latent
    extra = {} if concat is None else {"concat_latent_image": concat}
    hook = model.model.diffusion_model.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.inference_mode():
            comfy.sample.sample_custom(model, torch.zeros_like(latent), cfg, comfy.samplers.KSAMPLER(sampler),
                                       torch.tensor([SIGMA, 0.0]), cond(model, 0, **extra), cond(model, 1, **extra),
                                       torch.zeros_like(latent), disable_pbar=True, seed=1)
    finally:
        hook.remove()
    return calls


def with_reference(frames: list[int]) -> list[int]:
    return [0, *frames[1:]]


@pytest.mark.parametrize("causal", WINDOWS)
@pytest.mark.parametrize("family", ["svd", "svd_padded", "svd_mid"])
def test_a_windows_control_features_equal_a_plain_computation_of_its_frames(
        apply, windows, controlnexts, precise, family, causal):
    """In float64: in float32 a convolution alone differs by 3e-6 between a batch of four and four of one."""
    controlnext, table, images = controlnexts[family], FAMILIES[family], video()
    module = controlnext.patcher.model
    calls = unet_calls(windows(apply(precise, controlnext, images), causal), 2 * random(FRAMES, 4, 8, 8))
    assert len(calls) == len(WINDOWS[causal])
    for call, frames in zip(calls, WINDOWS[causal], strict=True):
        frames = frames if family == "svd_mid" else with_reference(frames)
        with torch.inference_mode():
            whole = module(images[frames].double().movedim(-1, 1), torch.tensor([call["timestep"]]), table.stem_padding,
                           table.stem_pool)
            expected = fit(whole, call["features"].shape[-2:], table.pool_first, table.eps)
        assert float((call["features"] - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_is_sampled_as_a_video_of_its_frames_alone(apply, windows, controlnexts, svd, causal, cfg):
    images, latent, concat = video(), 2 * random(FRAMES, 4, 8, 8), image_latents()
    windowed = unet_calls(windows(apply(svd, controlnexts["svd"], images), causal), latent, concat, cfg)
    for call, frames in zip(windowed, WINDOWS[causal], strict=True):
        alone = apply(svd, controlnexts["svd"], images[with_reference(frames)])
        expected, = unet_calls(alone, latent[frames], concat[frames], cfg)
        assert call["num_video_frames"] == len(frames)
        assert call["cond_or_uncond"] == expected["cond_or_uncond"]
        assert float((call["output"] - expected["output"]).abs().max() / expected["output"].std()) <= 1e-5


@pytest.mark.parametrize("choice, referenced", [("auto", True), ("on", True), ("off", False)])
def test_window_reference_chooses_the_control_of_a_windows_first_frame(
        apply, windows, controlnexts, svd, choice, referenced):
    images, latent = video(), random(FRAMES, 4, 8, 8)
    model = apply(svd, controlnexts["svd"], images, window_reference=choice)
    second = unet_calls(windows(model), latent)[1]["features"]
    first, fourth = unet_calls(apply(svd, controlnexts["svd"], images), latent)[0]["features"][[0, 3]]
    assert torch.equal(second[0], first if referenced else fourth)


def test_each_frame_of_a_window_keeps_its_own_mask(apply, windows, controlnexts, svd):
    mask = torch.zeros(FRAMES, 64, 64)
    mask[[0, 4]] = 1
    calls = unet_calls(windows(apply(svd, controlnexts["svd"], video(), mask=mask)), random(FRAMES, 4, 8, 8))
    masked = [(call["weights"][0].flatten(1) != 0).all(dim=1).tolist() for call in calls]
    assert masked == [[frame in (0, 4) for frame in frames] for frames in WINDOWS[False]]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_windows_of_animatediff_evolved_get_their_frames(apply, controlnexts, cfg):
    model, images, frames = small_unet("sd15"), video(), [7, 8, 9]
    windowed = apply(model, controlnexts["sd15"], images)
    windowed.model_options["transformer_options"]["ad_params"] = {"sub_idxs": frames, "full_length": FRAMES}
    latent = random(3, 4, 8, 8)
    call, = unet_calls(windowed, latent, cfg=cfg)
    expected, = unet_calls(apply(model, controlnexts["sd15"], images[frames]), latent, cfg=cfg)
    assert torch.equal(call["output"], expected["output"])


def test_windows_over_another_dimension_are_refused_in_one_sentence(apply, windows, controlnexts, svd):
    model = windows(apply(svd, controlnexts["svd"], video()), dim=2)
    with pytest.raises(ValueError, match="^dim: .* set dim to 0 in Context Windows"):
        unet_calls(model, random(FRAMES, 4, 8, 8))


def test_too_few_control_frames_start_again_with_a_warning_and_too_many_are_cut(
        apply, windows, controlnexts, svd, caplog):
    images, latent = video(), random(FRAMES, 4, 8, 8)
    repeated = unet_calls(windows(apply(svd, controlnexts["svd"], images[:5], window_reference="off")), latent)
    by_hand = unet_calls(windows(apply(svd, controlnexts["svd"], images[[0, 1, 2, 3, 4] * 2], window_reference="off")),
                         latent)
    assert all(torch.equal(one["output"], other["output"]) for one, other in zip(repeated, by_hand, strict=True))
    assert "5 control images for a batch of 10; they are repeated" in caplog.text
    unet_calls(windows(apply(svd, controlnexts["svd"], torch.cat([images, images]))), latent)
    assert "20 control images for a batch of 10; they are cut" in caplog.text


def test_60_frames_need_no_more_memory_than_one_window(apply, windows, controlnexts, svd, monkeypatch):
    """Resident memory; without windows the UNet takes a quarter of a gigabyte more."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the memory that this process has freed cannot be given back first, and would be used again")
    size = 12
    images = video(60, 8 * size)
    monkeypatch.setattr(controlnexts["svd"].loaded.image_parts, "limit", 0)  # which many small ones come near

    def growth(frames: int) -> int:
        """Megabytes."""
        model = windows(apply(svd, controlnexts["svd"], images[:frames]), length=12, overlap=3)
        controlnexts["svd"].loaded.features.clear()
        give_back_memory()
        with PeakMemory() as memory:
            sample(model, cond(model, 0), cond(model, 1), torch.zeros(frames, 4, size, size), steps=1)
        return memory.bytes // 1024 ** 2
    sample(svd, cond(svd, 0), cond(svd, 1), torch.zeros(1, 4, size, size), steps=1)  # the model is loaded
    window, whole = growth(12), growth(60)
    print(f"12 frames: {window} MB, 60 frames: {whole} MB")
    assert whole <= window + 100
