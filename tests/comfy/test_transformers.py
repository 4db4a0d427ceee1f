"""Control of every transformer that this project knows, on small random models of the real classes.

Expected is what plain hooks on the blocks give (see tokens.py).
"""

import sys

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from sampling import cond, conds, one_call_each, picture, relative
from tokens import BASES, BLOCK_BEHIND, ENTERED, by_hand, drawn, entering, new_controlnext, picture_for, with_reference

TAKING_REFERENCES = ("flux", "qwen_image", "flux2", "z_image", "krea2")
REFERENCES = [base for base in TAKING_REFERENCES if base in BASES]


@pytest.fixture(scope="module", params=BASES)
def base(request) -> str:
    return request.param


@pytest.mark.versions
@pytest.mark.parametrize(("base", "place"), ENTERED, indirect=["base"])
def test_control_is_added_to_the_tokens_as_by_hand(base, model, control, controlnext, place):
    image = picture_for(base)
    with by_hand(base, model, controlnext, {BLOCK_BEHIND[place]: [(image, 0.8)]}):
        expected = drawn(base, model)
    controlled = control(model, controlnext, image, strength=0.8, inject_at=place)
    assert relative(drawn(base, *controlled), expected) <= 5e-5
    assert relative(drawn(base, model), expected) > 1e-2


def test_control_is_added_as_by_hand_where_a_latent_has_odd_sides(base, model, control, controlnext):
    image = picture(0, 1, *(side * BASES[base].ratio for side in (7, 11)))
    grid = tuple(-(-side // BASES[base].patch) for side in (7, 11))
    with by_hand(base, model, controlnext, {0: [(image, 1.0)]}, grid=grid):
        expected = drawn(base, model, size=(7, 11))
    assert relative(drawn(base, *control(model, controlnext, image), size=(7, 11)), expected) <= 5e-5


@pytest.mark.parametrize("settings", [dict(strength=0.0), dict(end_percent=0.001, start_percent=0.0005)], ids=str)
def test_control_that_is_off_changes_no_bit(base, model, control, controlnext, settings):
    options = dict(cfg=1.0, steps=3, denoise=0.5)
    assert torch.equal(drawn(base, *control(model, controlnext, picture_for(base), **settings), **options),
                       drawn(base, model, **options))


@pytest.mark.parametrize("settings", [
    dict(), dict(start_percent=0.3), dict(end_percent=0.6, apply_to="positive")], ids=str)
def test_both_routes_draw_the_same(base, model, apply, hang, controlnext, settings):
    images, (positive, negative) = picture_for(base, 1, 2), conds(model)
    settings = settings | dict(inject_at=BASES[base].places[-1])
    by_model = drawn(base, apply(model, controlnext, images, **settings), batch=2, steps=3)
    by_conditioning = drawn(base, model, *hang(controlnext, images, positive, negative, **settings), batch=2, steps=3)
    assert relative(by_conditioning, by_model) <= 1e-6
    assert relative(drawn(base, model, batch=2, steps=3), by_model) > 1e-3


@pytest.mark.parametrize(("base", "place"), ENTERED, indirect=["base"])
@pytest.mark.parametrize("routes", [("model", "model"), ("conditioning", "conditioning"), ("model", "conditioning")])
def test_two_controls_act_together_in_any_order(base, model, apply, hang, controlnext, routes, place):
    blocks, images, places = {}, (picture_for(base), picture_for(base, 1)), (place, "tokens")
    for image, at in zip(images, places, strict=True):
        blocks.setdefault(BLOCK_BEHIND[at], []).append((image, 0.6))
    with by_hand(base, model, controlnext, blocks):
        expected = drawn(base, model)
    asked = list(zip(routes, places, images, strict=True))
    for order in (asked, asked[::-1]):
        controlled, positive, negative = model, *conds(model)
        for route, place, image in order:
            settings = dict(strength=0.6, inject_at=place)
            if route == "model":
                controlled = apply(controlled, controlnext, image, **settings)
            else:
                positive, negative = hang(controlnext, image, positive, negative, **settings)
        assert relative(drawn(base, controlled, positive, negative), expected) <= 5e-5


def test_text_and_reference_pictures_enter_the_first_block_untouched(base, model, control, controlnext):
    positive, entered = conds(model)[0], []
    if base in REFERENCES:
        positive = with_reference(base, positive)
    with entering(base, model, 0, lambda tokens, text: entered.append((tokens.clone(), text.clone()))):
        drawn(base, model, positive, cfg=1.0)
        drawn(base, *control(model, controlnext, picture_for(base), positive), cfg=1.0)
    texts = [text for _, text in entered if BASES[base].picture != BASES[base].text]
    count = 16 * BASES[base].frames
    before, picture_, behind = zip(*(BASES[base].picture_in(tokens, count) for tokens, _ in entered), strict=True)
    for untouched in filter(None, (texts, before, behind)):
        assert torch.equal(*untouched)
    assert before[0].shape[1] + behind[0].shape[1] >= 24 * (base in REFERENCES)
    assert not torch.isclose(*picture_).all(-1).any()


@pytest.mark.parametrize("base", REFERENCES, indirect=True)
def test_control_is_added_beside_reference_pictures_as_by_hand(base, model, control, controlnext):
    prompts, place = [with_reference(base, prompt) for prompt in conds(model)], BASES[base].places[-1]
    blocks = {0: [(picture_for(base), 1.0)]}
    blocks.setdefault(BLOCK_BEHIND[place], []).append((picture_for(base, 1), 0.5))
    with by_hand(base, model, controlnext, blocks):
        expected = drawn(base, model, *prompts)
    controlled = control(model, controlnext, picture_for(base), *prompts)
    controlled = control(controlled[0], controlnext, picture_for(base, 1), *controlled[1:], strength=0.5,
                         inject_at=place)
    assert relative(drawn(base, *controlled), expected) <= 5e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_halves_draw_the_same_in_one_call_or_two(base, model, control, controlnext, monkeypatch, batch):
    prompts = [cond(model, seed, tokens=77) for seed in range(2)]  # with fewer, rounding alone differs by the bound
    controlled = control(model, controlnext, picture_for(base, 0, batch), *prompts)
    together = drawn(base, *controlled, batch=batch)
    one_call_each(monkeypatch, model)
    assert relative(drawn(base, *controlled, batch=batch), together) <= 1e-5


@pytest.mark.parametrize("base", [base for base in BASES if BASES[base].frames == 1], indirect=True)
def test_a_mask_says_where_and_in_which_picture_control_acts(base, model, apply, controlnext):
    image, halves, entered = picture_for(base), torch.zeros(2, 64, 64), []
    halves[1, :, 32:] = 1.0
    with entering(base, model, 0, lambda tokens, _: entered.append(tokens.clone())):
        for one in (model, apply(model, controlnext, image), apply(model, controlnext, image, mask=halves)):
            drawn(base, one, batch=2, cfg=1.0)
    plain, full, masked = (BASES[base].picture_in(tokens, 16)[1].unflatten(1, (4, 4)) for tokens in entered)
    assert torch.equal(masked[0], plain[0])
    assert torch.equal(masked[1, :, :2], plain[1, :, :2])
    assert torch.equal(masked[1, :, 2:], full[1, :, 2:])


def test_an_area_gets_its_part_of_the_control_image(run, base, model, control, controlnext):
    unit, image = 8 * BASES[base].patch, picture_for(base)  # 8 stands for a latent pixel, to ComfyUI
    part = image[:, BASES[base].side // 4:, BASES[base].side // 2:]
    area = run("ConditioningSetArea", conditioning=conds(model)[0], width=2 * unit, height=3 * unit, x=2 * unit, y=unit,
               strength=1.0)
    options = dict(cfg=1.0, silent=True)  # ComfyUI has no areas beside a sound
    with by_hand(base, model, controlnext, {0: [(part, 1.0)]}, grid=(3, 2)):
        expected = drawn(base, model, area, area, **options)
    assert relative(drawn(base, *control(model, controlnext, image, area, area), **options), expected) <= 5e-5


def test_a_picture_has_its_features_computed_once_for_all_steps_and_runs(base, model, control, controlnext,
                                                                         module_runs):
    _, runs = module_runs(controlnext)
    controlnext.loaded.features.clear()
    first, second = (drawn(base, *control(model, controlnext, picture_for(base, 3)), steps=2) for _ in range(2))
    assert len(runs) == len(controlnext.loaded.features.kept()) == 1
    assert torch.equal(first, second)


@pytest.mark.parametrize("base", ["sd3", "wan"], indirect=True)
def test_control_of_an_older_file_with_time_is_added_as_by_hand(pack, base, model, control, module_runs):
    older = new_controlnext(pack, base, timed=True)
    with by_hand(base, model, older, {0: [(picture_for(base), 0.8)]}):
        expected = drawn(base, model)
    controlled = control(model, older, picture_for(base), strength=0.8)
    assert relative(drawn(base, *controlled), expected) <= 5e-5

    _, runs = module_runs(older)
    for _ in range(2):
        drawn(base, *controlled, steps=3)
    assert len(runs) == 2, "the first of the three timesteps is known, and the second run takes all from the first"


@pytest.mark.parametrize("base", ["flux", "flux2"], indirect=True)
def test_distilled_guidance_at_cfg_1_takes_control(base, model, control, controlnext):
    prompts = [cond(model, 0, guidance=1.5), cond(model, 1)]
    with by_hand(base, model, controlnext, {0: [(picture(), 1.0)]}):
        expected = drawn(base, model, *prompts, cfg=1.0)
        other = drawn(base, model, cfg=1.0)
    assert relative(drawn(base, *control(model, controlnext, picture(), *prompts), cfg=1.0), expected) <= 5e-5
    assert relative(other, expected) > 1e-3


@pytest.mark.parametrize(("base", "control"), [("sd3", "model"), ("sd3", "conditioning"), ("z_image", "model")],
                         indirect=True)
def test_a_compiled_transformer_is_one_graph_traced_once_under_control(base, model, control, controlnext, monkeypatch):
    """Steps, runs, images and strengths all go through the same graph, before a block (Z-Image: after it)."""
    # ComfyUI's own attention for a CPU cannot be traced whole
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(sys.modules[type(model.model.diffusion_model).__module__], name, attention_pytorch,
                            raising=False)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward
    for seed in range(2):
        controlled, *prompts = control(model.clone(), controlnext, picture(seed), strength=1.0 - seed / 2)
        set_torch_compile_wrapper(controlled, backend=backend, fullgraph=True)
        drawn(base, controlled, *prompts, steps=2, seed=seed)
    assert len(graphs) == 1
