"""Control reaches a denoiser that is called or replaced in ways of its own, or says that it could not.

Each stand-in does what the named file and lines of a pack do: DeepCache (styler00dollar/ComfyUI-deepcache), NAG
(ChenDarYen/ComfyUI-NAG), AnimateDiff-Evolved and Advanced-ControlNet (Kosinkadink).
"""

import logging

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding
from models import small_sd3, small_transformer, small_unet
from sampling import cond, conds, latent, picture, relative, sample
from tokens import new_controlnext

BOUND = 1e-4  # of the picture's std: how many rows go through the denoiser at once changes the rounding


def without_options(model):
    """NAG's wan/model.py:203 calls a block's replacement with img, txt, vec and pe only."""
    def forward(executor, *args, **kwargs):
        options = kwargs.get("transformer_options") or next(arg for arg in args if isinstance(arg, dict))
        blocks = options.get("patches_replace", {}).get("dit", {})

        def bare(there):
            def replacement(given, extra):
                def block(args):
                    return extra["original_block"]({**args, "transformer_options": options})
                named = {key: value for key, value in given.items() if key != "transformer_options"}
                return there(named, {"original_block": block})
            return replacement
        options.setdefault("patches_replace", {})["dit"] = {block: bare(there) for block, there in blocks.items()}
        return executor(*args, **kwargs)
    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "bare", forward)
    return model


def own_forward(model, patched=True):
    """DeepCache.py:52-190: a whole forward of the UNet in a model_function_wrapper, with the patches of its options."""
    def apply_model(model_function, args):
        x, sigma, c = args["input"], args["timestep"], args["c"]
        base, unet, options = model.model, model.model.diffusion_model, c["transformer_options"]
        patches = options.get("patches", {}) if patched else {}
        h = base.model_sampling.calculate_input(sigma, x).to(unet.dtype)
        emb = unet.time_embed(timestep_embedding(base.model_sampling.timestep(sigma).float(), unet.model_channels))
        skips = []
        for index, block in enumerate(unet.input_blocks):
            options["block"] = ("input", index)
            h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options)
            skips.append(h)
            for patch in patches.get("input_block_patch_after_skip", ()):
                h = patch(h, options)
        options["block"] = ("middle", 0)
        h = forward_timestep_embed(unet.middle_block, h, emb, c["c_crossattn"], options)
        for index, block in enumerate(unet.output_blocks):
            options["block"] = ("output", index)
            skip = skips.pop()
            for patch in patches.get("output_block_patch", ()):
                h, skip = patch(h, skip, options)
            h = torch.cat([h, skip], dim=1)
            shape = skips[-1].shape if skips else None
            h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options, shape)
        return base.model_sampling.calculate_denoised(sigma, unet.out(h), x)
    model = model.clone()
    model.set_model_unet_function_wrapper(apply_model)
    return model


def one_row_at_a_time(model):
    """A model_function_wrapper that makes a call for each row, with the options of all."""
    def apply_model(model_function, args):
        def sliced(value, row):
            return value[row:row + 1] if torch.is_tensor(value) else value
        rows = [model_function(args["input"][row:row + 1], args["timestep"][row:row + 1],
                               **{key: sliced(value, row) for key, value in args["c"].items()})
                for row in range(len(args["input"]))]
        return torch.cat(rows)
    model = model.clone()
    model.set_model_unet_function_wrapper(apply_model)
    return model


def last_rows_twice(model):
    """A model_function_wrapper that appends a copy of the last row to a call, and drops what comes of it."""
    def twice(value):
        return torch.cat([value, value[-1:]]) if torch.is_tensor(value) else value

    def apply_model(model_function, args):
        output = model_function(twice(args["input"]), twice(args["timestep"]),
                                **{key: twice(value) for key, value in args["c"].items()})
        return output[:-1]
    model = model.clone()
    model.set_model_unet_function_wrapper(apply_model)
    return model


@pytest.fixture(scope="module")
def unet():
    return small_unet("sd15")


@pytest.mark.parametrize("base", ["wan", "flux", "sd3"])
def test_blocks_that_are_called_without_options_get_control(pack, control, base):
    model = small_sd3() if base == "sd3" else small_transformer(base)
    controlled = control(model, new_controlnext(pack, base), picture(), inject_at="block_0")
    expected = sample(*controlled, latent(base), steps=1)
    assert relative(expected, sample(model, *conds(model), latent(base), steps=1)) > 1e-3
    assert torch.equal(sample(without_options(controlled[0]), *controlled[1:], latent(base), steps=1), expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd15_mid"])
@pytest.mark.parametrize("order", ["before", "behind"])
def test_a_forward_of_a_packs_own_gets_control(control, controlnexts, unet, family, order):
    places = {"sdxl": "conv_in", "sd15_mid": "middle"}
    settings = dict(inject_at=places.get(family, "auto"), image=picture())
    controlnext = controlnexts["sd15" if family == "sdxl" else family]
    expected = sample(*control(unet, controlnext, **settings), latent("sd15"), cfg=2.0)
    if order == "before":
        controlled = control(own_forward(unet), controlnext, **settings)
    else:
        model, *prompts = control(unet, controlnext, **settings)
        controlled = own_forward(model), *prompts
    assert relative(sample(*controlled, latent("sd15"), cfg=2.0), expected) <= BOUND


@pytest.mark.parametrize("way", [one_row_at_a_time, last_rows_twice])
@pytest.mark.parametrize("family", ["sd15", "svd"])
def test_calls_with_other_rows_than_noted_get_the_control_of_their_rows(control, unets, controlnexts, way, family):
    """SVD's families leave the negative half as it is, so a call has to tell whose row it is."""
    model = unets["sd15"]
    settings = dict(image=picture(), apply_to="positive" if family == "svd" else "both")
    controlled = control(model, controlnexts["sd15"], **settings)
    expected = sample(*controlled, latent("sd15"), cfg=3.0, steps=1)
    assert relative(sample(way(controlled[0]), *controlled[1:], latent("sd15"), cfg=3.0, steps=1), expected) <= BOUND


def test_a_guider_that_asks_for_no_wrappers_has_its_regions_controlled(run, control, controlnexts, unet, monkeypatch):
    """NAG's samplers.py:101: a guider that calls its predict_noise itself."""
    positive = run("ConditioningSetArea", conditioning=cond(unet), width=32, height=64, x=32, y=0, strength=1.0)
    controlled = control(unet, controlnexts["sd15"], picture(), positive=positive, apply_to="positive")
    expected = sample(*controlled, latent("sd15"), cfg=3.0, steps=2)
    monkeypatch.setattr(comfy.samplers.CFGGuider, "__call__", comfy.samplers.CFGGuider.predict_noise)
    assert torch.equal(sample(*controlled, latent("sd15"), cfg=3.0, steps=2), expected)


def test_a_compiled_denoiser_is_the_base_that_it_was(apply, hang, controlnexts, compiler):
    """At the second queue, the object patch of the first is in the layers that all clones share."""
    # without attention, which is traced in dozens of pieces: ComfyUI's own for a CPU
    unet = small_unet("sd15", transformer_depth=[0, 0], transformer_depth_output=[0] * 4)
    compiled = apply(unet, controlnexts["sd15"], picture())
    compiled.add_object_patch("diffusion_model", torch.compile(unet.model.diffusion_model, backend="eager"))
    expected = sample(apply(unet, controlnexts["sd15"], picture()), *conds(unet), latent("sd15"), steps=1)
    assert relative(sample(compiled, *conds(unet), latent("sd15"), steps=1), expected) <= BOUND
    again = apply(compiled, controlnexts["sd15"], picture(), strength=0.5)
    assert torch.isfinite(sample(again, *conds(unet), latent("sd15"), steps=1)).all()
    hung = hang(controlnexts["sd15"], picture(), *conds(unet))
    assert torch.isfinite(sample(compiled, *hung, latent("sd15"), steps=1)).all()
    comfy.model_management.unload_all_models()


def test_a_denoiser_of_a_packs_derived_class_is_what_it_derives_from(pack, control):
    """NAG's samplers.py:161 and others give a denoiser a class of their own while they sample."""
    model = small_sd3()
    denoiser = model.model.diffusion_model
    controlled = control(model, new_controlnext(pack, "sd3"), picture())
    expected = sample(*controlled, latent("sd3"), steps=1)
    denoiser.__class__ = type("Derived", (type(denoiser),), {})
    again = control(model, new_controlnext(pack, "sd3"), picture())
    assert torch.equal(sample(*again, latent("sd3"), steps=1), expected)


def test_control_for_one_denoiser_never_acts_in_another(control, controlnexts, unet):
    """As autoguidance does it: a wrapper that asks another MODEL, too, with the arguments of the call."""
    other, seen = small_unet("sd15", seed=3), []

    def ask_both(model_function, args):
        seen.append(other.model.apply_model(args["input"], args["timestep"], **args["c"]))
        return model_function(args["input"], args["timestep"], **args["c"])
    asked = []
    for controlled in (True, False):
        model, *prompts = control(unet, controlnexts["sd15"], picture()) if controlled else (unet, *conds(unet))
        model = model.clone()
        model.set_model_unet_function_wrapper(ask_both)
        comfy.model_management.load_models_gpu([other])
        sample(model, *prompts, latent("sd15"), steps=1)
        asked.append(seen.pop())
    assert torch.equal(*asked)


def test_control_that_nothing_took_is_told_once_with_what_may_help(control, controlnexts, unet, caplog):
    """A forward that looks at no patches at all."""
    model, *prompts = control(unet, controlnexts["sd15"], picture())
    with caplog.at_level(logging.WARNING):
        sample(own_forward(model, patched=False), *prompts, latent("sd15"), cfg=2.0, steps=3)
    told = [record.getMessage() for record in caplog.records if "nothing took it" in record.getMessage()]
    assert len(told) == 1
    assert "down_0" in told[0] and "own_forward" in told[0] and "inject_at" in told[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sample(model, *prompts, latent("sd15"), cfg=2.0, steps=3)
    assert "nothing took it" not in caplog.text


def test_control_outside_of_its_steps_is_not_missed(control, controlnexts, unet, caplog):
    model, *prompts = control(unet, controlnexts["sd15"], picture(), start_percent=0.8)
    with caplog.at_level(logging.WARNING):
        sample(model, *prompts, latent("sd15"), sigmas=torch.tensor([14.0, 10.0]), steps=1)
    assert "nothing took it" not in caplog.text


def test_sliding_windows_of_animatediff_find_what_they_ask_a_controlnet_for(hang, unets, controlnexts):
    """AnimateDiff-Evolved's sampling.py:694 asks every ControlNet for sub_idxs while it samples, and sets two more."""
    hung = hang(controlnexts["sd15"], picture(), *conds(unets["sd15"]))
    net, found = hung[0][0][1]["control"], []

    def windows(executor, model, given, x_in, timestep, model_options):
        control = given[0][0]["control"]
        found.append(hasattr(control, "sub_idxs"))
        control.sub_idxs, control.full_latent_length, control.context_length = [0], 1, 1
        return executor(model, given, x_in, timestep, model_options)
    model = unets["sd15"].clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "windows", windows)
    sample(model, *hung, latent("sd15"), cfg=2.0)
    assert found == [True, True]
    # Advanced-ControlNet's control.py:717 takes any object with sub_idxs for one of its own class
    assert not any(hasattr(net, name) for name in ("sub_idxs", "full_latent_length", "context_length"))


@pytest.mark.parametrize("anchored", [False, True])
def test_a_window_of_an_animation_gets_the_control_of_its_frames(control, unets, controlnexts, anchored):
    """AnimateDiff-Evolved's sampling.py:903 tells the window in ad_params."""
    images, frames = picture(31, count=6), [3, 4, 1] if anchored else [2, 3, 4]

    def one_window(executor, model, given, x_in, timestep, model_options):
        params = {"sub_idxs": frames, "full_length": len(x_in)}
        told = {**model_options, "transformer_options": {**model_options["transformer_options"], "ad_params": params}}
        outputs = executor(model, given, x_in[frames], timestep[frames], told)
        whole = [torch.zeros_like(x_in) for _ in outputs]
        for to, output in zip(whole, outputs, strict=True):
            to[frames] = output
        return whole
    model, *prompts = control(unets["sd15"], controlnexts["sd15"], images)
    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "window", one_window)
    drawn = sample(model, *prompts, latent("sd15", batch=6), cfg=2.0, steps=1)
    expected = sample(*control(unets["sd15"], controlnexts["sd15"], images), latent("sd15", batch=6), cfg=2.0, steps=1)
    assert relative(drawn[frames], expected[frames]) <= BOUND


def test_a_call_outside_of_any_sampling_is_controlled(apply, unets, controlnexts):
    model = apply(unets["sd15"], controlnexts["sd15"], picture())
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0])
    context = cond(model)[0][0]
    comfy.model_management.load_models_gpu([model])

    def call(**options):
        with torch.inference_mode():
            return model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options)
    controlled = call(**model.model_options["transformer_options"], wrappers=model.wrappers)
    assert relative(controlled, call()) > 1e-3
