"""ControlNeXt to ControlNet: control hung on conditionings with ComfyUI's own nodes, beside Apply ControlNeXt's."""

import comfy.controlnet
import comfy.sampler_helpers
import pytest
import torch
from models import small_unet, stock_controlnet
from safetensors.torch import save_file
from sampling import FAMILIES, cond, conds, latent, picture, relative, sample

BOUND = 1e-6  # of the picture's standard deviation, between the two routes


@pytest.fixture
def both(apply, hang):
    """both(model, controlnext, image, positive, negative, sample, ...): the pictures by the two routes."""
    def draw_both(model, controlnext, image, positive, negative, draw, **settings):
        by_model = draw(apply(model, controlnext, image, **settings), positive, negative)
        by_conditioning = draw(model, *hang(controlnext, image, positive, negative, **settings))
        return by_conditioning, by_model
    return draw_both


@pytest.fixture
def control_net(run, controlnexts):
    """control_net(family, ...): the CONTROL_NET of a family's file."""
    def make(family="sd15", **optional):
        return run("ControlNeXtToControlNet", controlnext=controlnexts[family], **optional)
    return make


@pytest.fixture(scope="module")
def stock(run, unets, models_folder):
    """A ControlNet of ComfyUI's with random weights, loaded by its loader."""
    save_file(stock_controlnet(unets["sd15"]), models_folder / "controlnet" / "stock.safetensors")
    return run("ControlNetLoader", control_net_name="stock.safetensors")


@pytest.fixture
def module_calls(controlnexts, module_runs):
    """(images, runs): what the module of sd15 was run on since the test began, its caches empty."""
    controlnexts["sd15"].loaded.features.clear()
    controlnexts["sd15"].loaded.image_parts.clear()
    return module_runs(controlnexts["sd15"])


def area(run, conditioning, width, height, x, y):
    return run("ConditioningSetArea", conditioning=conditioning, width=width, height=height, x=x, y=y, strength=1.0)


@pytest.mark.versions
@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("family, base", FAMILIES.items())
def test_both_routes_draw_the_same(both, unets, controlnexts, family, base, cfg):
    model = unets[family]
    positive, negative = conds(model, base)
    ours, expected = both(model, controlnexts[family], picture(), positive, negative,
                          lambda *args: sample(*args, latent(base), cfg=cfg, steps=1))
    assert relative(ours, expected) <= BOUND
    assert relative(ours, sample(model, positive, negative, latent(base), cfg=cfg, steps=1)) > 1e-3


@pytest.mark.parametrize("settings", [
    dict(strength=0.3), dict(start_percent=0.3), dict(end_percent=0.6), dict(inject_at="conv_in"),
    dict(apply_to="positive")], ids=str)
def test_both_routes_draw_the_same_with(both, unets, controlnexts, settings):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    ours, expected = both(model, controlnexts["sd15"], picture(), positive, negative,
                          lambda *args: sample(*args, latent("sd15"), cfg=3.0, steps=4), **settings)
    assert relative(ours, expected) <= BOUND
    assert relative(ours, sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=4)) > 1e-3


@pytest.mark.parametrize("images, size", [(2, 64), (3, 64), (1, 96)])
def test_both_routes_draw_the_same_of_batches_and_images_of_any_size(both, unets, controlnexts, images, size):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    ours, expected = both(model, controlnexts["sd15"], picture(1, images, size, 64), positive, negative,
                          lambda *args: sample(*args, latent("sd15", batch=3), cfg=3.0, steps=1), resize="stretch")
    assert relative(ours, expected) <= BOUND


def test_both_routes_draw_the_same_in_the_other_samplers(run, both, unets, controlnexts):
    model = unets["sd15"]

    def advanced(model, positive, negative):
        return run("KSamplerAdvanced", model=model, add_noise="enable", noise_seed=1, steps=6, cfg=2.0,
                   sampler_name="euler", scheduler="normal", positive=positive, negative=negative,
                   latent_image={"samples": latent("sd15")}, start_at_step=2, end_at_step=5,
                   return_with_leftover_noise="disable")["samples"]

    def custom(model, positive, negative):
        guider = run("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)
        return run("SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=9), guider=guider,
                   latent_image={"samples": latent("sd15")}, sampler=run("KSamplerSelect", sampler_name="euler"),
                   sigmas=run("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0))[0]["samples"]
    positive, negative = conds(model, "sd15")
    for draw in (advanced, custom):
        ours, expected = both(model, controlnexts["sd15"], picture(), positive, negative, draw)
        assert relative(ours, expected) <= BOUND
        assert relative(ours, draw(model, positive, negative)) > 1e-3


def test_a_guider_of_two_prompts_has_its_first_one_called_positive(run, both, unets, controlnexts):
    """Its conditionings come in another order than CFG's."""
    model = unets["sd15"]

    def draw(model, positive, negative):
        guider = run("DualCFGGuider", model=model, cond1=positive, cond2=negative, negative=negative, cfg_conds=2.0,
                     cfg_cond2_negative=3.0, style="regular")
        return run("SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=9), guider=guider,
                   latent_image={"samples": latent("sd15")}, sampler=run("KSamplerSelect", sampler_name="euler"),
                   sigmas=run("BasicScheduler", model=model, scheduler="normal", steps=1, denoise=1.0))[0]["samples"]
    ours, expected = both(model, controlnexts["sd15"], picture(), *conds(model, "sd15"), draw, apply_to="positive")
    assert relative(ours, expected) <= BOUND
    assert relative(ours, draw(model, *conds(model, "sd15"))) > 1e-3


def test_both_routes_draw_the_same_in_context_windows(run, both, unets, controlnexts):
    model = run("ContextWindowsManual", model=unets["svd"], context_length=3, context_overlap=1, dim=0,
                context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="flat",
                freenoise=False, causal_window_fix=True)
    positive, negative = conds(model, "svd")
    latents = torch.zeros(6, 4, 8, 8)
    ours, expected = both(model, controlnexts["svd"], picture(2, count=6), positive, negative,
                          lambda *args: sample(*args, latents, cfg=2.0, steps=1))
    assert relative(ours, expected) <= BOUND


def test_both_routes_draw_the_same_with_masked_conditionings(run, both, unets, controlnexts):
    model = unets["sd15"]
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    positive, negative = conds(model, "sd15")
    masked = [*run("ConditioningSetMask", conditioning=positive, mask=mask, strength=1.0, set_cond_area="default"),
              *run("ConditioningSetMask", conditioning=cond(model, 2), mask=1 - mask, strength=1.0,
                   set_cond_area="mask bounds")]
    ours, expected = both(model, controlnexts["sd15"], picture(), masked, negative,
                          lambda *args: sample(*args, latent("sd15"), cfg=3.0, steps=2))
    assert relative(ours, expected) <= BOUND


def test_hooks_on_conditionings_act_beside_control_as_without_it(run, both, unets, controlnexts, models_folder):
    """A LoRA hook with keyframes: the same picture as on the controlled MODEL, other than without the hook."""
    model = unets["sd15"]
    model_keys = model.model.state_dict()
    key = next(key for key in model_keys if key.endswith("attn1.to_q.weight"))
    name = key.removesuffix(".weight")
    generator = torch.Generator().manual_seed(4)
    save_file({f"{name}.lora_up.weight": torch.randn(model_keys[key].shape[0], 2, generator=generator),
               f"{name}.lora_down.weight": torch.randn(2, model_keys[key].shape[1], generator=generator)},
              models_folder / "loras" / "hooked.safetensors")
    frames = run("CreateHookKeyframe", strength_mult=0.5, start_percent=0.5,
                 prev_hook_kf=run("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0))
    hooks = run("SetHookKeyframes", hook_kf=frames, hooks=run(
        "CreateHookLoraModelOnly", lora_name="hooked.safetensors", strength_model=1.0))
    positive, negative = conds(model, "sd15")
    hooked = [run("ConditioningSetProperties", cond_NEW=one, strength=1.0, set_cond_area="default", hooks=hooks)
              for one in (positive, negative)]

    def draw(*args):
        return sample(*args, latent("sd15"), cfg=3.0, steps=4)
    ours, expected = both(model, controlnexts["sd15"], picture(), *hooked, draw)
    assert relative(ours, expected) <= BOUND
    without = both(model, controlnexts["sd15"], picture(), positive, negative, draw)[0]
    assert relative(ours, without) > 1e-3


@pytest.mark.parametrize("first", ["model", "conditioning"])
def test_a_control_of_each_route_normalizes_against_the_same_uncontrolled_features(apply, hang, unets, controlnexts,
                                                                                   first):
    model, controlnext = unets["sd15"], controlnexts["sd15"]
    positive, negative = conds(model, "sd15")
    images = [picture(1), picture(2)] if first == "model" else [picture(2), picture(1)]
    two = sample(apply(apply(model, controlnext, picture(1), 0.6), controlnext, picture(2), 0.6), positive, negative,
                 latent("sd15"), cfg=3.0)
    mixed = sample(apply(model, controlnext, images[0], 0.6), *hang(controlnext, images[1], positive, negative, 0.6),
                   latent("sd15"), cfg=3.0)
    chained = sample(model, *hang(controlnext, images[1], *hang(controlnext, images[0], positive, negative, 0.6), 0.6),
                     latent("sd15"), cfg=3.0)
    assert relative(mixed, two) <= 1e-5
    assert relative(chained, two) <= 1e-5


def test_a_controlnet_of_comfyuis_before_or_after_acts_as_beside_the_other_route(run, apply, hang, unets, controlnexts,
                                                                                 stock):
    model, controlnext = unets["sd15"], controlnexts["sd15"]
    positive, negative = conds(model, "sd15")

    def add_stock(positive, negative):
        return run("ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=stock,
                   image=picture(5), strength=0.7, start_percent=0.0, end_percent=1.0)

    def draw(model, positive, negative):
        return sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=2)
    expected = draw(apply(model, controlnext, picture()), *add_stock(positive, negative))
    assert relative(draw(model, *add_stock(*hang(controlnext, picture(), positive, negative))), expected) <= BOUND
    assert relative(draw(model, *hang(controlnext, picture(), *add_stock(positive, negative))), expected) <= BOUND
    assert relative(expected, draw(apply(model, controlnext, picture()), positive, negative)) > 1e-3


@pytest.mark.parametrize("family", ["sd15", "svd"])
def test_control_hung_on_the_positive_alone_leaves_the_negative_half_untouched(run, unets, controlnexts, family,
                                                                              control_net, hang):
    model = unets[family]
    positive, negative = conds(model, family)
    halves = {}

    def note(module, args, kwargs, output):
        indices = kwargs["transformer_options"]["cond_or_uncond"]
        halves.update(zip(indices, output.chunk(len(indices)), strict=True))
    hook = model.model.diffusion_model.register_forward_hook(note, with_kwargs=True)
    try:
        results = []
        controlled = run("ControlNetApplyAdvanced", positive=positive, negative=[], control_net=control_net(family),
                         image=picture(), strength=1.0, start_percent=0.0, end_percent=1.0)[0]
        for one in (positive, controlled):
            sample(model, one, negative, latent(family), cfg=7.0, steps=1)
            results.append(dict(halves))
    finally:
        hook.remove()
    assert relative(results[1][1], results[0][1]) <= 1e-4  # one call of both halves against a call of each
    assert relative(results[1][0], results[0][0]) > 1e-3


def test_each_region_has_its_own_control_or_none(run, hang, unets, controlnexts, module_calls):
    """Two areas with a control each beside an uncontrolled one: each sees its own, the third none."""
    model, controlnext = unets["sd15"], controlnexts["sd15"]
    _, negative = conds(model, "sd15")
    left = area(run, hang(controlnext, picture(1), cond(model, 1), [])[0], 32, 64, 0, 0)
    right = area(run, hang(controlnext, picture(2), cond(model, 2), [])[0], 32, 32, 32, 0)
    rest = area(run, cond(model, 3), 32, 32, 32, 32)
    images, _ = module_calls
    drawn = sample(model, [*left, *right, *rest], negative, latent("sd15"), cfg=1.0, steps=1)
    seen = {tuple(image.shape[-2:]): image for image in images}
    assert len(images) == 2
    assert torch.equal(seen[64, 32], picture(1).movedim(-1, 1)[..., :32])
    assert torch.equal(seen[32, 32], picture(2).movedim(-1, 1)[..., :32, 32:])
    plain = sample(model, [*area(run, cond(model, 1), 32, 64, 0, 0), *area(run, cond(model, 2), 32, 32, 32, 0), *rest],
                   negative, latent("sd15"), cfg=1.0, steps=1)
    changed = (drawn - plain).abs().amax(1)[0]
    assert changed[4:, 4:].max() <= 1e-5 * plain.std()
    assert changed[:, :4].max() > 1e-3 and changed[:4, 4:].max() > 1e-3


def test_an_image_made_for_an_area_is_fitted_into_it_as_comfyuis_own_controlnets_do(run, hang, unets, controlnexts,
                                                                                    stock, module_calls):
    model = unets["sd15"]
    positive, negative = cond(model), cond(model, 1)
    hint = picture(3, height=32, width=48)
    images, _ = module_calls
    hung, _ = hang(controlnexts["sd15"], hint, positive, [])
    sample(model, area(run, hung, 32, 64, 32, 0), negative, latent("sd15"), cfg=1.0, steps=1)
    theirs = run("ControlNetApplyAdvanced", positive=positive, negative=[], control_net=stock, image=hint, strength=1.0,
                 start_percent=0.0, end_percent=1.0)[0]
    net, seen = theirs[0][1]["control"], []
    net.upscale_algorithm = "lanczos"
    hook = net.control_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hint"].clone()), with_kwargs=True)
    sample(model, area(run, theirs, 32, 64, 32, 0), negative, latent("sd15"), cfg=1.0, steps=1)
    hook.remove()
    assert len(images) == 1 and torch.equal(images[0], seen[0])


def test_it_is_a_controlnet_to_comfyui(control_net, controlnexts, unets):
    net = control_net(inject_at="conv_in", apply_to="positive").set_cond_hint(picture().movedim(-1, 1), 0.5, (0.1, 0.9))
    assert isinstance(net, comfy.controlnet.ControlBase)
    copy = net.copy()
    assert type(copy) is type(net) and copy is not net
    assert (copy.strength, copy.timestep_percent_range, copy.asked.inject_at, copy.asked.apply_to) == (
        0.5, (0.1, 0.9), "conv_in", "positive")
    assert copy.cond_hint_original is net.cond_hint_original
    assert copy.get_models() == [controlnexts["sd15"].patcher]
    copy.set_previous_controlnet(net)
    assert copy.get_models() == [controlnexts["sd15"].patcher] * 2
    # hooks that need loaded weights to change would have ComfyUI load the MODEL anew without dynamic loading
    assert not comfy.sampler_helpers.cond_has_hooks([[None, {"control": copy}]])


def test_nothing_stays_in_the_model_or_the_options_that_conditionings_share(hang, unets, controlnexts):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    before = repr(model.model_options)
    plain = sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=2)
    hung = hang(controlnexts["sd15"], picture(), positive, negative)
    assert relative(sample(model, *hung, latent("sd15"), cfg=3.0, steps=2), plain) > 1e-3
    assert repr(model.model_options) == before and not model.wrappers and not model.callbacks
    assert torch.equal(sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=2), plain)


def test_the_image_is_read_at_every_run_since_others_replace_it(hang, unets, controlnexts):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    one, other = (hang(controlnexts["sd15"], picture(seed), positive, negative) for seed in (1, 2))
    first, expected = (sample(model, *hung, latent("sd15"), steps=1) for hung in (one, other))
    assert not torch.equal(first, expected)
    one[0][0][1]["control"].cond_hint_original = picture(2).movedim(-1, 1)
    assert torch.equal(sample(model, *one, latent("sd15"), steps=1), expected)


def test_a_copy_for_another_device_draws_the_same(hang, unets, controlnexts):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    hung = hang(controlnexts["sd15"], picture(), positive, negative)
    expected = sample(model, *hung, latent("sd15"), steps=1)
    net = hung[0][0][1]["control"]
    copy = net.deepclone_multigpu(torch.device("cpu"), autoregister=True)
    assert net.get_instance_for_device(torch.device("cpu")) is copy
    assert copy.control_model is not net.control_model and copy.cond_hint_original is net.cond_hint_original
    assert copy.control_model_wrapped in net.get_models()
    cloned = [[positive[0][0], {**positive[0][1], "control": copy}]]
    assert torch.equal(sample(model, cloned, negative, latent("sd15"), steps=1), expected)


def test_the_module_runs_as_often_as_by_the_other_route_and_never_in_a_second_run(hang, unets, controlnexts,
                                                                                 module_calls):
    model = unets["sd15"]
    positive, negative = conds(model, "sd15")
    images, timesteps = module_calls
    first, again = (sample(model, *hang(controlnexts["sd15"], picture(12), positive, negative),
                           latent("sd15", batch=2), cfg=3.0, steps=3, seed=7) for _ in range(2))
    assert (len(images), len(timesteps)) == (1, 3)
    assert torch.equal(first, again)


def test_a_wrong_base_is_our_sentence_at_the_first_use(hang, unets, controlnexts):
    hung = hang(controlnexts["sd15_mid"], picture(), *conds(unets["sdxl"], "sdxl"))
    with pytest.raises(ValueError, match="^model: the ControlNeXt file is sd15_mid .* but the connected MODEL is SDXL"):
        sample(unets["sdxl"], *hung, latent("sdxl"), steps=1)
    wider = small_unet("sd15", channel_mult=[1, 2])
    hung = hang(controlnexts["sd15_mid"], picture(), *conds(wider, "sd15"))
    with pytest.raises(ValueError, match="^inject_at: sd15_mid.safetensors gives 64 channels .* at middle"):
        sample(wider, *hung, latent("sd15"), steps=1)
    bad = picture()
    bad[0, 0, 0] = float("nan")
    hung = hang(controlnexts["sd15"], bad, *conds(unets["sd15"], "sd15"))
    with pytest.raises(ValueError, match="^image: the control image holds NaN or infinite values"):
        sample(unets["sd15"], *hung, latent("sd15"), steps=1)


def test_comfyuis_own_loader_does_not_know_the_file(run, goldens, models_folder):
    """What the help page and Troubleshooting quote."""
    save_file(goldens.state_dict("sd15"), models_folder / "controlnet" / "module.safetensors")
    with pytest.raises(RuntimeError, match="controlnet file is invalid and does not contain a valid controlnet model"):
        run("ControlNetLoader", control_net_name="module.safetensors")
