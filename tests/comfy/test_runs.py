"""What a control means is settled when a model runs, not when its node does: by both routes, in ComfyUI's samplers."""

import copy
import functools
import gc
import weakref

import comfy.model_management
import pytest
import torch
from models import small_unet, stock_controlnet
from safetensors.torch import save_file
from sampling import cond, conds, latent, picture, relative, sample
from versions import on_older

VERSIONS = pytest.mark.versions

# {kind of sampling: (node that makes it, its inputs)}
SAMPLINGS = {
    "epsilon": None,
    "v": ("ModelSamplingDiscrete", dict(sampling="v_prediction", zsnr=False)),
    "zsnr": ("ModelSamplingDiscrete", dict(sampling="v_prediction", zsnr=True)),
    "lcm": ("ModelSamplingDiscrete", dict(sampling="lcm", zsnr=False)),
    "edm": ("ModelSamplingContinuousEDM", dict(sampling="edm", sigma_max=120.0, sigma_min=0.002)),
    "flow 2.0": ("ModelSamplingSD3", dict(shift=2.0)),
    "flow 2.5": ("ModelSamplingSD3", dict(shift=2.5)),
    "flow 1.58": ("ModelSamplingSD3", dict(shift=1.58)),
}
KINDS = on_older(SAMPLINGS, ["epsilon", "flow 1.58"])
PERCENTS = [(0.25, 0.75), (0.75, 1.0), (0.5, 0.625)]  # ComfyUI's own lose the first step of shift 1.58 at a start of 0


@pytest.fixture(scope="module")
def unet():
    return small_unet("sd15")


@pytest.fixture(scope="module")
def with_sampling(run):
    """with_sampling(model, kind): the MODEL behind the node that makes a kind of sampling."""
    def patch(model, kind):
        if SAMPLINGS[kind] is None:
            return model
        node, inputs = SAMPLINGS[kind]
        patched = run(node, model=model, **inputs)
        return patched[0] if isinstance(patched, (list, tuple)) else patched
    return patch


@pytest.fixture(scope="module")
def stock(run, unet, models_folder):
    """A ControlNet of ComfyUI's own."""
    save_file(stock_controlnet(unet), models_folder / "controlnet" / "stock_for_runs.safetensors")
    return run("ControlNetLoader", control_net_name="stock_for_runs.safetensors")


@pytest.fixture
def acted(pack, monkeypatch):
    """acted(model, positive, negative, ...): in which steps of a sampling control was added."""
    injection = pack("nodes.runtime.injection")
    added, real = [], injection.add_controls
    monkeypatch.setattr(injection, "add_controls", lambda *args: added.append(1) or real(*args))

    def steps(model, positive, negative, **settings):
        added.clear()
        per_step, before = [], 0

        def callback(*_):
            nonlocal before
            per_step.append(len(added) > before)
            before = len(added)
        sample(model, positive, negative, latent("sd15"), callback=callback, **settings)
        return per_step
    return steps


def interrupted(draw) -> None:
    """A sampling that the user stops in its second step."""
    def interrupt(step, *_):
        if step == 1:
            comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(callback=interrupt)


@pytest.fixture(scope="module")
def acts_of_comfyuis_own(run, unet, stock, with_sampling):
    """acts_of_comfyuis_own(kind, start, end): in which of 8 steps ComfyUI's own ControlNet acts."""
    @functools.cache
    def steps(kind: str, start: float, end: float) -> list[bool]:
        model, calls, acted = with_sampling(unet, kind), [], []
        theirs = run("ControlNetApplyAdvanced", positive=cond(model), negative=cond(model, 1), control_net=stock,
                     image=picture(), strength=1.0, start_percent=start, end_percent=end)
        hook = theirs[0][0][1]["control"].control_model.register_forward_hook(lambda *_: calls.append(1))
        sample(model, *theirs, latent("sd15"), steps=8, scheduler="simple",
               callback=lambda *_: acted.append(len(calls) > sum(acted)))
        hook.remove()
        return acted
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_percents_choose_the_steps_that_comfyuis_own_controlnet_takes(control, controlnexts, unet, acted, with_sampling,
                                                                       acts_of_comfyuis_own, kind):
    model = with_sampling(unet, kind)
    for start, end in PERCENTS:
        controlled = control(model, controlnexts["sd15"], picture(), start_percent=start, end_percent=end)
        steps = acted(*controlled, steps=8, scheduler="simple")
        assert steps == acts_of_comfyuis_own(kind, start, end), (start, end)


@VERSIONS
@pytest.mark.parametrize("sigmas", [(1.02, 0.7, 0.3, 0.0), (1.0, 0.5, 1e-6, 0.0)])
def test_start_0_and_end_1_are_no_bounds(control, controlnexts, unet, acted, with_sampling, sigmas):
    model = with_sampling(unet, "flow 1.58")
    controlled = control(model, controlnexts["sd15"], picture())
    assert acted(*controlled, steps=3, sigmas=torch.tensor(sigmas)) == [True] * 3
    assert acted(*controlled, steps=4) == [True] * 4


@VERSIONS
@pytest.mark.parametrize("kind", ["epsilon", "flow 2.0", "flow 2.5"])
def test_keyframes_begin_at_the_steps_at_which_percents_begin(run, apply, controlnexts, unet, acted, with_sampling,
                                                              kind):
    model = with_sampling(unet, kind)
    for start in (0.25, 0.5, 0.75):
        off = run("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
        keyframes = run("CreateHookKeyframe", strength_mult=1.0, start_percent=start, prev_hook_kf=off)
        by_keyframe = apply(model, controlnexts["sd15"], picture(), strength_keyframes=keyframes)
        by_percent = apply(model, controlnexts["sd15"], picture(), start_percent=start)
        steps = [acted(one, *conds(model), steps=4, scheduler="simple") for one in (by_keyframe, by_percent)]
        assert steps[0] == steps[1] and True in steps[0] and False in steps[0]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_sampling_node_before_or_behind_apply_gives_the_same_picture(apply, controlnexts, unet, with_sampling, kind):
    settings = dict(image=picture(), controlnext=controlnexts["sd15"], start_percent=0.2, end_percent=0.5)
    before = apply(with_sampling(unet, kind), **settings)
    behind = with_sampling(apply(unet, **settings), kind)
    drawn = [sample(model, *conds(unet), latent("sd15"), steps=8, cfg=2.0) for model in (before, behind)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], sample(with_sampling(unet, kind), *conds(unet), latent("sd15"), steps=8, cfg=2.0))


@VERSIONS
def test_the_run_after_an_interrupted_one_takes_its_own_steps_and_nothing_stays(control, controlnexts, unet, acted,
                                                                               with_sampling):
    """The same objects again, on a MODEL with another shift, as when a queue goes on with another sampling node."""
    controlnext, steps = controlnexts["sd15"], dict(steps=5, sigmas=torch.tensor([0.95, 0.8, 0.65, 0.5, 0.3, 0.0]))
    model, *prompts = control(unet, controlnext, picture(), end_percent=0.5)
    first, second = (with_sampling(model, kind) for kind in ("flow 1.58", "flow 2.5"))
    expected = acted(second, *prompts, **steps)
    assert acted(first, *prompts, **steps) != expected
    interrupted(lambda callback: sample(first, *prompts, latent("sd15"), callback=callback, **steps))
    assert controlnext.loaded.image_parts.size == 0, "what only a running sampling needs was not given back"
    assert acted(second, *prompts, **steps) == expected


@VERSIONS
def test_nothing_of_a_run_outlives_it(pack, control, controlnexts, unet, monkeypatch):
    made, real = [], pack("nodes.runtime.control").Control.__init__

    def note(self, *args, **settings):
        made.append(weakref.ref(self))
        real(self, *args, **settings)
    monkeypatch.setattr(pack("nodes.runtime.control").Control, "__init__", note)
    controlled = control(unet, controlnexts["sd15"], picture(7, height=40, width=48))
    sample(*controlled, latent("sd15"), cfg=2.0)
    interrupted(lambda callback: sample(*controlled, latent("sd15"), steps=5, callback=callback))
    gc.collect()
    assert made and not any(control() for control in made)


@VERSIONS
@pytest.mark.parametrize("family", ["sd15", "svd"])
def test_a_regional_positive_prompt_is_positive(run, control, unets, controlnexts, family):
    """ComfyUI gives the negative half a twin of a cond with an area, under the same uuid."""
    model = unets[family]
    base = "svd" if family == "svd" else "sd15"
    regional = run("ConditioningSetArea", conditioning=conds(model, base)[0], width=32, height=64, x=32, y=0,
                   strength=1.0)
    _, negative = conds(model, base)
    plain = sample(model, regional, negative, latent(base), cfg=2.0, steps=1)
    drawn = {apply_to: sample(*control(model, controlnexts[family], picture(), positive=regional, apply_to=apply_to),
                              latent(base), cfg=2.0, steps=1) for apply_to in ("auto", "positive", "both")}
    assert relative(drawn["positive"], plain) > 1e-3
    assert relative(drawn["positive"], drawn["both"]) > 1e-3, "the negative half is controlled, too"
    assert torch.equal(drawn["auto"], drawn["positive" if family == "svd" else "both"])


@VERSIONS
def test_a_deep_copy_draws_bit_for_bit_alike_and_shares_what_is_heavy(control, controlnexts, unet, module_runs):
    controlnext = controlnexts["sd15"]
    model, positive, negative = control(unet, controlnext, picture(11))
    expected = sample(model, positive, negative, latent("sd15"), cfg=2.0)
    images, timesteps = module_runs(controlnext)
    prompts = copy.deepcopy((positive, negative))
    assert torch.equal(sample(model, *prompts, latent("sd15"), cfg=2.0), expected)
    patcher = model.clone()
    patcher.model_options = copy.deepcopy(patcher.model_options)
    assert torch.equal(sample(patcher, *prompts, latent("sd15"), cfg=2.0), expected)
    assert not images and not timesteps, "the copies share no kept features"
    assert copy.deepcopy(controlnext) is controlnext


@VERSIONS
@pytest.mark.parametrize("when", ["between the runs", "in a run"])
def test_a_picture_that_is_changed_in_place_does_no_harm_beyond_its_own_run(control, controlnexts, unet, when):
    original, changed = picture(21), picture(22)
    expected, other = (sample(*control(unet, controlnexts["sd15_mid"], one.clone()), latent("sd15"), steps=3)
                       for one in (original, changed))
    controlnexts["sd15_mid"].loaded.features.clear()
    shared = original.clone()
    controlled = control(unet, controlnexts["sd15_mid"], shared)

    def exchange(step, *_):
        if step == 0:
            shared.copy_(changed)
    if when == "in a run":
        sample(*controlled, latent("sd15"), steps=3, callback=exchange)
    else:
        exchange(0)
    assert torch.equal(sample(*controlled, latent("sd15"), steps=3), other)
    again = control(unet, controlnexts["sd15_mid"], original.clone())
    assert torch.equal(sample(*again, latent("sd15"), steps=3), expected)


@VERSIONS
def test_the_incoming_model_and_other_clones_of_it_carry_nothing(apply, controlnexts, unet):
    before = repr((unet.model_options, unet.wrappers, unet.callbacks, unet.additional_models))
    first = apply(unet, controlnexts["sd15"], picture(1))
    carried = repr(first.model_options)
    apply(first, controlnexts["sd15"], picture(2))
    assert repr(first.model_options) == carried
    sample(first, *conds(unet), latent("sd15"))
    assert repr(first.model_options) == carried
    assert repr((unet.model_options, unet.wrappers, unet.callbacks, unet.additional_models)) == before


@VERSIONS
def test_a_model_whose_patches_another_node_cleared_samples_as_without_control(apply, controlnexts, unet):
    cleared = apply(unet, controlnexts["sd15"], picture()).clone()
    cleared.model_options["transformer_options"]["patches"] = {}
    assert torch.equal(sample(cleared, *conds(unet), latent("sd15")), sample(unet, *conds(unet), latent("sd15")))
