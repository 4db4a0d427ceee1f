"""Strength over the sampling, from ComfyUI's own Curve Editor and hook keyframes."""

import pytest
import torch
from models import narrowed, small_unet
from safetensors.torch import save_file
from sampling import cond, sample

pytestmark = pytest.mark.versions

STEPS = 6
STEP_DOWN = [(0.0, 1.0), (0.499, 1.0), (0.501, 0.0), (1.0, 0.0)]


@pytest.fixture(scope="module")
def unet():
    return small_unet("sd15")


@pytest.fixture(scope="module")
def sampled(run, goldens, models_folder, unet):
    """sampled(**options of Apply ControlNeXt): the latent; with ``split``, by KSampler (Advanced) in two runs."""
    save_file(narrowed(goldens.state_dict("sd15")), models_folder / "controlnext" / "sd15.safetensors")
    controlnext = run("ControlNeXtLoader", controlnext_name="sd15.safetensors", variant="sd15")
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def sampled(strength=1.0, end_percent=1.0, split=None, **options):
        model = run("ControlNeXtApply", model=unet, controlnext=controlnext, image=image, strength=strength,
                    start_percent=0.0, end_percent=end_percent, **options)
        positive, negative = cond(model, 0), cond(model, 1)
        latent = torch.zeros(1, 4, 8, 8)
        if split is None:
            return sample(model, positive, negative, latent, cfg=2.0, steps=STEPS)
        latent = {"samples": latent}
        for noise, start, end in (("enable", 0, split), ("disable", split, STEPS)):
            latent = run("KSamplerAdvanced", model=model, positive=positive, negative=negative, latent_image=latent,
                         add_noise=noise, noise_seed=5, steps=STEPS, cfg=2.0, sampler_name="euler", scheduler="normal",
                         start_at_step=start, end_at_step=end, return_with_leftover_noise="enable")
        return latent["samples"]
    return sampled


@pytest.fixture(scope="module")
def curve(run, comfy_nodes):
    """curve(points): what the Curve Editor puts on its link."""
    def edit(points):
        if "CurveEditor" not in comfy_nodes:
            pytest.skip("this ComfyUI has no Curve Editor")
        return run("CurveEditor", curve={"points": points, "interpolation": "linear"})
    return edit


@pytest.fixture(scope="module")
def keyframes(run):
    """keyframes((strength, start_percent), ...): a chain of Create Hook Keyframe nodes."""
    def create(*frames):
        group = None
        for strength, start in frames:
            group = run("CreateHookKeyframe", strength_mult=strength, start_percent=start, prev_hook_kf=group)
        return group
    return create


def test_the_curve_input_is_there_where_comfyui_has_a_curve_editor(comfy_nodes):
    optional = comfy_nodes["ControlNeXtApply"].INPUT_TYPES()["optional"]
    assert ("strength_curve" in optional) == ("CurveEditor" in comfy_nodes)
    assert optional["strength_keyframes"][0] == "HOOK_KEYFRAMES"


@pytest.mark.curve_editor
def test_a_constant_curve_multiplies_strength(sampled, curve):
    assert torch.equal(sampled(strength_curve=curve([(0.0, 0.5), (1.0, 0.5)])), sampled(strength=0.5))
    assert not torch.equal(sampled(strength=0.5), sampled())


def test_a_constant_keyframe_multiplies_strength(sampled, keyframes):
    assert torch.equal(sampled(strength_keyframes=keyframes((0.5, 0.0))), sampled(strength=0.5))


@pytest.mark.curve_editor
def test_a_curve_that_falls_to_0_ends_control_there(sampled, curve):
    ended = sampled(end_percent=0.5)
    assert torch.equal(sampled(strength_curve=curve(STEP_DOWN)), ended)
    assert not torch.equal(ended, sampled())


def test_a_keyframe_of_strength_0_ends_control_there(sampled, keyframes):
    assert torch.equal(sampled(strength_keyframes=keyframes((1.0, 0.0), (0.0, 0.5))), sampled(end_percent=0.5))


def test_the_first_keyframe_counts_before_it_begins(sampled, keyframes):
    assert torch.equal(sampled(strength_keyframes=keyframes((0.5, 0.3))), sampled(strength=0.5))


@pytest.mark.curve_editor
def test_curve_and_keyframes_multiply(sampled, curve, keyframes):
    both = sampled(strength_curve=curve([(0.0, 0.5), (1.0, 0.5)]), strength_keyframes=keyframes((0.5, 0.0)))
    assert torch.equal(both, sampled(strength=0.25))


@pytest.mark.curve_editor
def test_a_sampling_in_two_runs_follows_the_same_curve(sampled, curve):
    ramp = curve([(0.0, 1.0), (1.0, 0.0)])
    whole = sampled(strength_curve=ramp)
    torch.testing.assert_close(sampled(strength_curve=ramp, split=3), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sampled(split=3), whole, rtol=1e-2, atol=1e-2)


def test_another_strength_over_time_takes_the_features_as_they_are(sampled, keyframes, pack, monkeypatch):
    sampled()
    cache = pack("nodes.runtime.feature_cache").FeatureCache
    found = []
    get = cache.get
    monkeypatch.setattr(cache, "get", lambda self, key, compute, **step: get(
        self, key, lambda: found.append(key) or compute(), **step))
    sampled(strength_keyframes=keyframes((0.7, 0.0), (0.3, 0.5)))
    assert not found
