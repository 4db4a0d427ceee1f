"""What Apply ControlNeXt does to a sampling, in ComfyUI's own samplers, on small UNets of the real classes."""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from models import small_unets
from sampling import FAMILIES, conds, latent, one_call_each, picture, relative, sample


@pytest.fixture(scope="module")
def precise():
    return small_unets(torch.float64)


@pytest.fixture
def unet_calls():
    """Records (cond_or_uncond, output) of every UNet call of the models it is given."""
    hooks = []

    def record(model) -> list:
        calls = []
        hooks.append(model.model.diffusion_model.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(
                (list(kwargs["transformer_options"]["cond_or_uncond"]), output)), with_kwargs=True))
        return calls
    yield record
    for hook in hooks:
        hook.remove()


@pytest.mark.versions
@pytest.mark.parametrize("family, base", FAMILIES.items())
def test_control_changes_the_picture_and_strength_zero_changes_no_bit(apply, unets, controlnexts, family, base):
    model = unets[family]
    positive, negative = conds(model, base)
    plain = sample(model, positive, negative, latent(base), cfg=2.0)
    controlled = sample(apply(model, controlnexts[family], picture()), positive, negative, latent(base), cfg=2.0)
    off = sample(apply(model, controlnexts[family], picture(), strength=0.0), positive, negative, latent(base), cfg=2.0)
    assert torch.isfinite(controlled).all()
    assert relative(controlled, plain) > 1e-3
    assert torch.equal(off, plain)
    assert torch.equal(sample(model, positive, negative, latent(base), cfg=2.0), plain), "the incoming MODEL changed"


@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("family, base", FAMILIES.items())
def test_guidance_halves_give_the_same_picture_in_one_call_or_two(apply, controlnexts, monkeypatch, unet_calls, precise,
                                                                  family, base, cfg):
    """In float64: in float32 the UNet alone differs by 1e-5 (SD) to 1e-4 (SVD) between one batch of two and two."""
    model = apply(precise[family], controlnexts[family], picture())
    positive, negative = conds(model, base)
    calls = unet_calls(model)
    together = sample(model, positive, negative, latent(base), cfg=cfg, steps=2)
    assert {len(halves) for halves, _ in calls} == {1 if cfg == 1.0 else 2}
    calls.clear()
    one_call_each(monkeypatch, model)
    apart = sample(model, positive, negative, latent(base), cfg=cfg, steps=2)
    assert {len(halves) for halves, _ in calls} == {1}
    assert relative(apart, together) <= 1e-5


@pytest.mark.parametrize("family", ["svd", "svd_padded"])
def test_svd_leaves_the_unconditional_half_untouched(apply, unets, controlnexts, unet_calls, family):
    model = unets["svd"]
    positive, negative = conds(model, "svd")
    calls = unet_calls(model)
    for one in (model, apply(model, controlnexts[family], picture())):
        sample(one, positive, negative, latent("svd"), cfg=7.0, steps=1)
    (halves, plain), (_, controlled) = calls
    plain, controlled = (dict(zip(halves, output.chunk(2), strict=True)) for output in (plain, controlled))
    assert torch.equal(controlled[1], plain[1])
    assert not torch.equal(controlled[0], plain[0])


def test_svd_mid_gives_the_unconditional_half_the_references_065(apply, unets, controlnexts, unet_calls):
    model, controlnext = unets["svd_mid"], controlnexts["svd_mid"]
    positive, _ = conds(model, "svd")
    scale = controlnext.loaded.checkpoint.scale
    as_positive = apply(model, controlnext, picture(), strength=0.65 / (1.3 / (1 + 2.718281828459045 ** -scale)))
    calls = unet_calls(model)
    sample(apply(model, controlnext, picture()), positive, positive, latent("svd"), cfg=7.0, steps=1)
    sample(as_positive, positive, positive, latent("svd"), cfg=7.0, steps=1)
    (halves, auto), (_, weaker) = calls
    negative = auto.chunk(2)[halves.index(1)]
    assert relative(negative, weaker.chunk(2)[halves.index(0)]) <= 1e-5


@pytest.mark.parametrize("apply_to, negative_is_controlled", [("auto", True), ("both", True), ("positive", False)])
def test_apply_to_chooses_the_halves(apply, unets, controlnexts, unet_calls, apply_to, negative_is_controlled):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    calls = unet_calls(model)
    for one in (model, apply(model, controlnexts["sd15"], picture(), apply_to=apply_to)):
        sample(one, positive, negative, latent("sd15"), cfg=7.0, steps=1)
    (halves, plain), (_, controlled) = calls
    index = halves.index(1)
    assert torch.equal(controlled.chunk(2)[index], plain.chunk(2)[index]) is not negative_is_controlled
    assert not torch.equal(controlled.chunk(2)[1 - index], plain.chunk(2)[1 - index])


@pytest.mark.parametrize("first, second", [("sd15", "sd15"), ("sd15", "sd15_mid")])
def test_order_of_two_controls_does_not_matter(apply, unets, controlnexts, first, second):
    model = unets["sd15_mid"]
    positive, negative = conds(model, "sd15")
    one, two = (first, picture(1)), (second, picture(2))
    pictures = []
    for order in ((one, two), (two, one)):
        patched = model
        for family, image in order:
            patched = apply(patched, controlnexts[family], image, strength=0.7)
        pictures.append(sample(patched, positive, negative, latent("sd15"), cfg=3.0))
    assert relative(*pictures) <= 1e-5
    only_one = apply(model, controlnexts[first], picture(1), strength=0.7)
    alone = sample(only_one, positive, negative, latent("sd15"), cfg=3.0)
    assert relative(pictures[0], alone) > 1e-3, "the second control did nothing"


def test_two_controls_both_normalize_against_the_uncontrolled_features(apply, unets, controlnexts):
    """The same control twice at half strength is that control once: none is normalized against a controlled h."""
    model, controlnext = unets["sd15"], controlnexts["sd15"]
    positive, negative = conds(model, "sd15")
    twice = apply(apply(model, controlnext, picture(), strength=0.5), controlnext, picture(), strength=0.5)
    once = sample(apply(model, controlnext, picture()), positive, negative, latent("sd15"))
    assert relative(sample(twice, positive, negative, latent("sd15")), once) <= 1e-5


@pytest.mark.parametrize("family", ["sd15", "sdxl", "svd_mid"])
def test_mask_of_zeros_is_off_and_of_ones_is_no_mask(apply, unets, controlnexts, family):
    base = FAMILIES[family]
    model, controlnext = unets[family], controlnexts[family]
    positive, negative = conds(model, base)
    plain = sample(model, positive, negative, latent(base), cfg=2.0)
    full = sample(apply(model, controlnext, picture()), positive, negative, latent(base), cfg=2.0)
    zeros = apply(model, controlnext, picture(), mask=torch.zeros(1, 64, 64))
    ones = apply(model, controlnext, picture(), mask=torch.ones(1, 64, 64))
    assert torch.equal(sample(zeros, positive, negative, latent(base), cfg=2.0), plain)
    assert torch.equal(sample(ones, positive, negative, latent(base), cfg=2.0), full)


def test_mask_per_picture_controls_one_and_leaves_the_other(apply, unets, controlnexts, unet_calls):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    mask = torch.stack([torch.zeros(32, 32), torch.ones(32, 32)])
    calls = unet_calls(model)
    for one in (model, apply(model, controlnexts["sd15"], picture()),
                apply(model, controlnexts["sd15"], picture(), mask=mask)):
        sample(one, positive, negative, latent("sd15", batch=2), steps=1)
    plain, full, masked = (output for _, output in calls)
    assert torch.equal(masked[0], plain[0])
    assert torch.equal(masked[1], full[1])


def test_images_of_a_batch_go_to_the_pictures_of_the_batch(apply, unets, controlnexts, unet_calls):
    model, controlnext = unets["sd15"], controlnexts["sd15"]
    positive, negative = conds(model, "sd15")
    calls = unet_calls(model)
    images = torch.cat([picture(1), picture(2)])
    for image in (images, images[:1], images[1:]):
        sample(apply(model, controlnext, image), positive, negative, latent("sd15", batch=2), cfg=3.0, steps=1)
    (halves, both), (_, first), (_, second) = calls
    for half in range(len(halves)):
        assert relative(both.chunk(2)[half][0], first.chunk(2)[half][0]) <= 1e-5
        assert relative(both.chunk(2)[half][1], second.chunk(2)[half][1]) <= 1e-5


def test_image_batch_is_repeated_or_cut_with_a_warning(apply, unets, controlnexts, caplog):
    model, controlnext = unets["sd15"], controlnexts["sd15"]
    positive, negative = conds(model, "sd15")
    images = picture(4, count=3)
    expected = sample(apply(model, controlnext, images[:2]), positive, negative, latent("sd15", batch=2), steps=1)
    cut = sample(apply(model, controlnext, images), positive, negative, latent("sd15", batch=2), steps=1)
    assert torch.equal(cut, expected)
    assert "3 control images for a batch of 2; they are cut" in caplog.text
    repeated = sample(apply(model, controlnext, images[:2]), positive, negative, latent("sd15", batch=3), steps=1)
    by_hand = sample(apply(model, controlnext, images[[0, 1, 0]]), positive, negative, latent("sd15", batch=3), steps=1)
    assert torch.equal(repeated, by_hand)
    assert "2 control images for a batch of 3; they are repeated" in caplog.text


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_is_repeated_and_alpha_dropped(apply, unets, controlnexts, channels):
    model, controlnext = unets["sd15"], controlnexts["sd15"]
    positive, negative = conds(model, "sd15")
    image = torch.rand(1, 64, 64, channels, generator=torch.Generator().manual_seed(1))
    rgb = image[..., :3] if channels == 4 else image.repeat(1, 1, 1, 3)
    results = [sample(apply(model, controlnext, one), positive, negative, latent("sd15"), steps=1)
               for one in (image, rgb)]
    assert torch.equal(*results)


@pytest.mark.parametrize("size", [(48, 80), (72, 40)])
@pytest.mark.parametrize("family", ["sd15", "sd15_mid", "sdxl"])
def test_image_of_another_size_is_stretched_to_the_picture(apply, unets, controlnexts, family, size):
    from PIL import Image
    model, controlnext = unets[family], controlnexts[family]
    positive, negative = conds(model, FAMILIES[family])
    shape = torch.zeros(1, 4, size[0] // 8, size[1] // 8)
    image = (picture(6) * 255).to(torch.uint8)
    stretched = Image.fromarray(image[0].numpy()).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    stretched = torch.frombuffer(bytearray(stretched.tobytes()), dtype=torch.uint8).reshape(1, *size, 3)
    # (x + 0.5) / 255 survives ComfyUI's rounding to 8 bits on the way into its Lanczos
    results = [sample(apply(model, controlnext, one), positive, negative, shape, steps=1)
               for one in ((image.float() + 0.5) / 255.5, stretched.float() / 255)]
    assert relative(*results) <= 1e-2


@pytest.mark.parametrize("start, end, expected", [(0.0, 0.4, [1, 1, 0, 0]), (0.5, 1.0, [0, 0, 1, 1]),
                                                  (0.0, 1.0, [1] * 4)])
def test_start_and_end_percent_choose_the_steps(apply, unets, controlnexts, pack, monkeypatch, start, end, expected):
    injection = pack("nodes.runtime.injection")
    acted = []
    real = injection.add_controls
    monkeypatch.setattr(injection, "add_controls", lambda *args: acted.append(1) or real(*args))
    model = apply(unets["sd15"], controlnexts["sd15"], picture(), start_percent=start, end_percent=end)
    per_step = []

    def callback(step, *_):
        per_step.append(len(acted))
        acted.clear()
    positive, negative = conds(model, "sd15")
    sample(model, positive, negative, latent("sd15"), steps=4, callback=callback)
    assert per_step == expected


def test_advanced_sampling_from_a_later_step_honours_the_percents(run, apply, unets, controlnexts, comfy_nodes):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")

    def advanced(patched):
        return run("KSamplerAdvanced", model=patched, add_noise="enable", noise_seed=1, steps=8, cfg=2.0,
                   sampler_name="euler", scheduler="normal", positive=positive, negative=negative,
                   latent_image={"samples": latent("sd15")}, start_at_step=5, end_at_step=8,
                   return_with_leftover_noise="disable")["samples"]
    plain = advanced(model)
    assert torch.equal(advanced(apply(model, controlnexts["sd15"], picture(), end_percent=0.5)), plain)
    assert relative(advanced(apply(model, controlnexts["sd15"], picture(), start_percent=0.7)), plain) > 1e-4


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2s_ancestral", "heun", "ddim",
                                     "uni_pc", "lcm"])
def test_samplers_run_under_control(apply, unets, controlnexts, sampler):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    patched = apply(model, controlnexts["sd15"], picture())
    controlled = sample(patched, positive, negative, latent("sd15"), cfg=3.0, steps=3, sampler=sampler)
    assert torch.isfinite(controlled).all()
    plain = sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=3, sampler=sampler)
    assert relative(controlled, plain) > 1e-3


def test_sampler_custom_advanced_equals_ksampler(run, apply, unets, controlnexts):
    model = apply(unets["sd15"], controlnexts["sd15"], picture())
    positive, negative = conds(model, "sd15")
    expected = sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=3, seed=9)
    output, _ = run(
        "SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=9), latent_image={"samples": latent("sd15")},
        guider=run("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0),
        sampler=run("KSamplerSelect", sampler_name="euler"),
        sigmas=run("BasicScheduler", model=model, scheduler="normal", steps=3, denoise=1.0))
    assert torch.equal(output["samples"], expected)


def test_interrupted_run_leaves_the_incoming_model_as_it_was(apply, unets, controlnexts):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    plain = sample(model, positive, negative, latent("sd15"), cfg=2.0)
    patched = apply(model, controlnexts["sd15"], picture())
    controlled = sample(patched, positive, negative, latent("sd15"), cfg=2.0)

    def interrupt(step, *_):
        if step == 1:
            comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, positive, negative, latent("sd15"), cfg=2.0, steps=5, callback=interrupt)
    assert torch.equal(sample(model, positive, negative, latent("sd15"), cfg=2.0), plain)
    assert torch.equal(sample(patched, positive, negative, latent("sd15"), cfg=2.0), controlled)


def test_apply_registers_nothing_on_the_incoming_model(apply, unets, controlnexts):
    model = unets["sd15_mid"].clone()
    apply(apply(model, controlnexts["sd15"], picture()), controlnexts["sd15_mid"], picture())
    assert not model.model_options["transformer_options"].get("patches")
    assert not model.get_all_wrappers(WrappersMP.APPLY_MODEL)
    assert not model.get_all_wrappers(WrappersMP.PREDICT_NOISE)


def test_second_apply_leaves_the_first_ones_model_as_it_was(apply, unets, controlnexts):
    positive, negative = conds(unets["sd15"], "sd15")
    first = apply(unets["sd15"], controlnexts["sd15"], picture(1))
    before = sample(first, positive, negative, latent("sd15"))
    apply(first, controlnexts["sd15"], picture(2))
    assert torch.equal(sample(first, positive, negative, latent("sd15")), before)


@pytest.mark.parametrize("place", ["conv_in", "down_0", "before_middle", "middle"])
def test_inject_at_moves_the_control(apply, unets, controlnexts, place):
    """On a UNet of one width every place fits, and each gives another picture."""
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    auto = sample(apply(model, controlnexts["sd15"], picture()), positive, negative, latent("sd15"), steps=1)
    there = apply(model, controlnexts["sd15"], picture(), inject_at=place)
    moved = sample(there, positive, negative, latent("sd15"), steps=1)
    assert torch.isfinite(moved).all()
    assert torch.equal(moved, auto) is (place == "down_0")


def test_a_regional_cond_is_controlled_by_its_part_of_the_image(run, apply, unets, controlnexts, pack, monkeypatch):
    """A cond with an area sees the control image where the area is, not the whole image squeezed into it."""
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    right = run("ConditioningSetArea", conditioning=positive, width=32, height=64, x=32, y=0, strength=1.0)
    image = picture(8)
    seen = []
    module = controlnexts["sd15"].patcher.model
    real = module.image_part
    monkeypatch.setattr(module, "image_part", lambda image, *args: seen.append(image.clone()) or real(image, *args))
    sample(apply(model, controlnexts["sd15"], image), right, negative, latent("sd15"), cfg=2.0, steps=1)
    expected = image.movedim(-1, 1)
    assert any(part.shape[-1] == 32 and torch.equal(part, expected[..., 32:]) for part in seen)
    assert any(torch.equal(part, expected) for part in seen), "the negative covers the whole picture"
    assert len(seen) == 2


def test_the_same_file_is_loaded_once_whatever_its_variant(run, controlnexts):
    again = run("ControlNeXtLoader", controlnext_name="sd15.safetensors", variant="auto")
    assert again.patcher is controlnexts["sd15"].patcher


def test_comfyui_manages_the_module(apply, unets, controlnexts):
    patched = apply(unets["sd15"], controlnexts["sd15"], picture())
    positive, negative = conds(patched, "sd15")
    sample(patched, positive, negative, latent("sd15"), steps=1)
    assert controlnexts["sd15"].patcher in patched.model_patches_models()
    assert controlnexts["sd15"].patcher in comfy.model_management.loaded_models()
    loader, arguments = controlnexts["sd15"].patcher.cached_patcher_init
    copy = loader(*arguments, disable_dynamic=True)
    assert copy is not controlnexts["sd15"].patcher
    for ours, theirs in zip(copy.model.parameters(), controlnexts["sd15"].patcher.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_features_computed_once_for_all_halves_and_again_never(apply, unets, controlnexts, monkeypatch):
    """One run of the module per timestep, shared by halves and batch; a second run of the prompt needs none."""
    module = controlnexts["sd15"].patcher.model
    images, steps = [], []
    image_part, timestep_part = module.image_part, module.timestep_part
    monkeypatch.setattr(module, "image_part", lambda *args: images.append(1) or image_part(*args))
    monkeypatch.setattr(module, "timestep_part", lambda *args: steps.append(1) or timestep_part(*args))
    controlnexts["sd15"].loaded.features.clear()
    model = apply(unets["sd15"], controlnexts["sd15"], picture(11))
    positive, negative = conds(model, "sd15")
    one_call_each(monkeypatch, model)
    first = sample(model, positive, negative, latent("sd15", batch=2), cfg=3.0, steps=4)
    assert (len(images), len(steps)) == (1, 4)
    again = apply(unets["sd15"], controlnexts["sd15"], picture(11))
    assert torch.equal(sample(again, positive, negative, latent("sd15", batch=2), cfg=3.0, steps=4), first)
    assert (len(images), len(steps)) == (1, 4)
