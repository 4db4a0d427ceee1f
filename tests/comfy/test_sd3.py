"""Control of a transformer: SD3's, and SD3.5 medium's with its second attention, on small models of the real class.

Expected is a plain torch hook that adds control before a block: of this project it takes the module alone.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from models import NARROW, SD35_MEDIUM, small_sd3
from sampling import conds, latent, one_call_each, picture, relative, sample

from controlnext_core.families import FAMILIES
from controlnext_core.training import new_module

WIDTH = 192
BLOCK_BEHIND = {"tokens": 0, "block_0": 1, "block_1": 2}


@pytest.fixture(scope="module")
def models():
    return {"SD3": small_sd3(), "SD3.5 medium": small_sd3(**SD35_MEDIUM)}


@pytest.fixture(scope="module")
def sd3(models):
    return models["SD3"]


@pytest.fixture(scope="module")
def controlnext(pack):
    module = new_module(FAMILIES["sd3"], seed=1, out=WIDTH, **NARROW)
    return pack("nodes.model").trained_controlnext(module.state_dict(), "auto", "small.safetensors", {})


@pytest.fixture(params=["model", "conditioning"])
def control(request, apply, hang):
    """control(model, controlnext, image, ...): (MODEL, positive, negative) under control by one route or the other."""
    def controlled(model, controlnext, image, positive=None, negative=None, **settings):
        positive, negative = positive or conds(model, "sd3")[0], negative or conds(model, "sd3")[1]
        if request.param == "model":
            return apply(model, controlnext, image, **settings), positive, negative
        return model, *hang(controlnext, image, positive, negative, **settings)
    return controlled


def drawn(model, positive=None, negative=None, batch=1, size=(8, 8), **options) -> torch.Tensor:
    positive, negative = positive or conds(model, "sd3")[0], negative or conds(model, "sd3")[1]
    return sample(model, positive, negative, latent("sd3", batch, *size), **{"cfg": 3.0, "steps": 1, **options})


def module_features(controlnext, image, timestep, grid) -> torch.Tensor:
    """Normalized features as tokens, (1, h * w, C)."""
    features = controlnext.patcher.model(image.movedim(-1, 1), timestep, 1, False)
    features = F.adaptive_avg_pool2d(features, grid)
    normal = (features - features.mean((1, 2, 3), keepdim=True)) / features.std((1, 2, 3), keepdim=True)
    return normal.flatten(2).transpose(1, 2)


@contextmanager
def by_hand(model, controlnext, blocks: dict[int, list], grid=(4, 4)):
    """Add control before blocks of a model, {block: [(image, strength)]}, all normalized against the same tokens."""
    transformer, timestep = model.model.diffusion_model, []

    def hook_adding(added):
        def add(_, args):
            text, x = args
            mean, std = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)
            return text, x + sum(strength * (module_features(controlnext, image, timestep[-1], grid) * std + mean)
                                 for image, strength in added)
        return add
    hooks = [transformer.register_forward_pre_hook(lambda _, args: timestep.append(args[1][:1]))]
    hooks += [transformer.joint_blocks[index].register_forward_pre_hook(hook_adding(added))
              for index, added in blocks.items()]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.versions
@pytest.mark.parametrize("place", BLOCK_BEHIND)
@pytest.mark.parametrize("name", ["SD3", "SD3.5 medium"])
def test_control_is_added_to_the_tokens_as_by_hand(models, control, controlnext, name, place):
    model = models[name]
    with by_hand(model, controlnext, {BLOCK_BEHIND[place]: [(picture(), 0.8)]}):
        expected = drawn(model)
    assert relative(drawn(*control(model, controlnext, picture(), strength=0.8, inject_at=place)), expected) <= 5e-5
    assert relative(drawn(model), expected) > 1e-2


def test_control_is_added_as_by_hand_where_a_latent_has_odd_sides(sd3, control, controlnext):
    image = picture(0, 1, 7 * 8, 11 * 8)
    with by_hand(sd3, controlnext, {0: [(image, 1.0)]}, grid=(4, 6)):
        expected = drawn(sd3, size=(7, 11))
    assert relative(drawn(*control(sd3, controlnext, image), size=(7, 11)), expected) <= 5e-5


@pytest.mark.parametrize("settings", [dict(strength=0.0), dict(end_percent=0.001, start_percent=0.0005)], ids=str)
def test_control_that_is_off_changes_no_bit(sd3, control, controlnext, settings):
    assert torch.equal(drawn(*control(sd3, controlnext, picture(), **settings), cfg=1.0, steps=3, denoise=0.5),
                       drawn(sd3, cfg=1.0, steps=3, denoise=0.5))


@pytest.mark.parametrize("settings", [
    dict(), dict(start_percent=0.3), dict(end_percent=0.6), dict(inject_at="block_0"), dict(apply_to="positive")],
    ids=str)
def test_both_routes_draw_the_same(sd3, apply, hang, controlnext, settings):
    images, (positive, negative) = picture(1, 2), conds(sd3, "sd3")
    by_model = drawn(apply(sd3, controlnext, images, **settings), batch=2, steps=3)
    by_conditioning = drawn(sd3, *hang(controlnext, images, positive, negative, **settings), batch=2, steps=3)
    assert relative(by_conditioning, by_model) <= 1e-6
    assert relative(drawn(sd3, batch=2, steps=3), by_model) > 1e-3


@pytest.mark.parametrize("places", [("tokens", "tokens"), ("tokens", "block_0"), ("block_1", "tokens")])
@pytest.mark.parametrize("routes", [("model", "model"), ("conditioning", "conditioning"), ("model", "conditioning")])
def test_two_controls_act_together_in_any_order(sd3, apply, hang, controlnext, routes, places):
    blocks = {}
    for seed, place in enumerate(places):
        blocks.setdefault(BLOCK_BEHIND[place], []).append((picture(seed), 0.6))
    with by_hand(sd3, controlnext, blocks):
        expected = drawn(sd3)
    asked = list(zip(routes, places, (picture(0), picture(1)), strict=True))
    for order in (asked, asked[::-1]):
        model, positive, negative = sd3, *conds(sd3, "sd3")
        for route, place, image in order:
            settings = dict(strength=0.6, inject_at=place)
            if route == "model":
                model = apply(model, controlnext, image, **settings)
            else:
                positive, negative = hang(controlnext, image, positive, negative, **settings)
        assert relative(drawn(model, positive, negative), expected) <= 5e-5


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_replacement_of_the_block_is_called(sd3, control, controlnext, when):
    def louder(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": 2.0 * out["img"]}

    def with_replacement(model):
        model = model.clone()
        model.set_model_patch_replace(louder, "dit", "double_block", 0)
        return model
    with by_hand(sd3, controlnext, {0: [(picture(), 1.0)]}):
        expected = drawn(with_replacement(sd3))
    if when == "before":
        controlled = control(with_replacement(sd3), controlnext, picture())
    else:
        model, *prompts = control(sd3, controlnext, picture())
        controlled = with_replacement(model), *prompts
    assert relative(drawn(*controlled), expected) <= 5e-5
    assert relative(drawn(*control(sd3, controlnext, picture())), expected) > 1e-2


def test_control_enters_a_block_that_skip_layer_guidance_skips(run, sd3, control, controlnext):
    def skipping(model):
        return run("SkipLayerGuidanceDiT", model=model, double_layers="0", single_layers="", scale=3.0,
                   start_percent=0.0, end_percent=1.0, rescaling_scale=0.0)

    transformer = sd3.model.diffusion_model
    model, *prompts = control(sd3, controlnext, picture())
    tokens = []
    hook = transformer.joint_blocks[1].register_forward_pre_hook(lambda _, args: tokens.append(args[1].clone()))
    drawn(skipping(model), *prompts, cfg=1.0)
    drawn(skipping(sd3), cfg=1.0)
    hook.remove()
    assert len(tokens) == 4
    assert relative(tokens[1], tokens[3]) > 1e-2, "the skipped forward went without control"


def test_text_tokens_enter_the_first_block_untouched(sd3, control, controlnext):
    entered = []
    hook = sd3.model.diffusion_model.joint_blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args))
    drawn(sd3)
    drawn(*control(sd3, controlnext, picture()))
    hook.remove()
    (text, tokens), (controlled_text, controlled_tokens) = entered
    assert torch.equal(controlled_text, text)
    assert not torch.equal(controlled_tokens, tokens)


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_halves_give_the_same_picture_in_one_call_or_two(control, pack, monkeypatch, batch):
    """In float64, as the model alone differs in float32."""
    model = small_sd3(torch.float64)
    module = new_module(FAMILIES["sd3"], seed=1, out=WIDTH, **NARROW)
    controlnext = pack("nodes.model").trained_controlnext(module.state_dict(), "auto", "small.safetensors", {})
    controlled = control(model, controlnext, picture(0, batch))
    together = drawn(*controlled, batch=batch)
    one_call_each(monkeypatch, model)
    assert relative(drawn(*controlled, batch=batch), together) <= 1e-5


def test_a_mask_says_where_and_in_which_picture_control_acts(sd3, apply, controlnext):
    halves = torch.zeros(2, 64, 64)
    halves[1, :, 32:] = 1.0
    entered = []
    hook = sd3.model.diffusion_model.joint_blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[1]))
    for model in (sd3, apply(sd3, controlnext, picture()), apply(sd3, controlnext, picture(), mask=halves)):
        drawn(model, batch=2, cfg=1.0)
    hook.remove()
    plain, full, masked = (tokens.unflatten(1, (4, 4)) for tokens in entered)
    assert torch.equal(masked[0], plain[0])
    assert torch.equal(masked[1, :, :2], plain[1, :, :2])
    assert torch.equal(masked[1, :, 2:], full[1, :, 2:])


def test_an_area_gets_its_part_of_the_control_image(run, sd3, control, controlnext):
    positive, negative = conds(sd3, "sd3")
    area = run("ConditioningSetArea", conditioning=positive, width=32, height=48, x=32, y=16, strength=1.0)
    with by_hand(sd3, controlnext, {0: [(picture()[:, 16:, 32:], 1.0)]}, grid=(3, 2)):
        expected = drawn(sd3, area, area, cfg=1.0)
    assert relative(drawn(*control(sd3, controlnext, picture(), area, area), cfg=1.0), expected) <= 5e-5


def test_a_second_run_takes_all_features_from_the_first(sd3, control, controlnext, monkeypatch):
    module, runs = controlnext.patcher.model, []
    timestep_part = module.timestep_part
    monkeypatch.setattr(module, "timestep_part", lambda *args: runs.append(1) or timestep_part(*args))
    controlnext.loaded.features.clear()
    first, second = (drawn(*control(sd3, controlnext, picture(3)), steps=2) for _ in range(2))
    assert len(runs) == 2
    assert torch.equal(first, second)


def test_a_compiled_transformer_is_one_graph_traced_once_under_control(sd3, control, controlnext, monkeypatch):
    """Steps, runs, images and strengths all go through the same graph."""
    # ComfyUI's own attention for a CPU cannot be traced whole
    monkeypatch.setattr("comfy.ldm.modules.diffusionmodules.mmdit.optimized_attention", attention_pytorch)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward
    for seed in range(2):
        controlled, *prompts = control(sd3.clone(), controlnext, picture(seed), strength=1.0 - seed / 2)
        set_torch_compile_wrapper(controlled, backend=backend, fullgraph=True)
        drawn(controlled, *prompts, steps=2, seed=seed)
    assert len(graphs) == 1


def test_a_place_that_a_transformer_lacks_is_answered_with_those_that_it_has(sd3, control, controlnext):
    with pytest.raises(ValueError, match=r"^inject_at: small.safetensors gives 192 channels and should enter at "
                                         r"down_0, but the connected MODEL has no such place; set inject_at to "
                                         r"tokens or block_0 or block_1\.$"):
        drawn(*control(sd3, controlnext, picture(), inject_at="down_0"))
