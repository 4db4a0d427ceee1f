"""What only SD3 has: SD3.5 medium's second attention, ComfyUI's own replacements of its blocks."""

import pytest
from models import SD35_MEDIUM, small_sd3, two_block_sd3
from sampling import picture, relative
from tokens import by_hand, drawn, entering, new_controlnext


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


@pytest.fixture(scope="module")
def controlnext(pack):
    return new_controlnext(pack, "sd3")


@pytest.mark.parametrize("config", [{}, {**SD35_MEDIUM, "x_block_self_attn_layers": [0]}], ids=["SD3", "SD3.5 medium"])
def test_control_is_added_as_by_hand_at_the_width_of_the_released_models(pack, control, config):
    model, controlnext = two_block_sd3(**config), new_controlnext(pack, "sd3", width=1536)
    without = drawn("sd3", model)
    for place, block in (("tokens", 0), ("block_0", 1)):
        with by_hand("sd3", model, controlnext, {block: [(picture(), 0.8)]}):
            expected = drawn("sd3", model)
        controlled = control(model, controlnext, picture(), strength=0.8, inject_at=place)
        assert relative(drawn("sd3", *controlled), expected) <= 5e-5
        assert relative(without, expected) > 1e-2


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_replacement_of_the_block_is_called(sd3, control, controlnext, when):
    def louder(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": 2.0 * out["img"]}

    def with_replacement(model):
        model = model.clone()
        model.set_model_patch_replace(louder, "dit", "double_block", 0)
        return model
    with by_hand("sd3", sd3, controlnext, {0: [(picture(), 1.0)]}):
        expected = drawn("sd3", with_replacement(sd3))
    if when == "before":
        controlled = control(with_replacement(sd3), controlnext, picture())
    else:
        model, *prompts = control(sd3, controlnext, picture())
        controlled = with_replacement(model), *prompts
    assert relative(drawn("sd3", *controlled), expected) <= 5e-5
    assert relative(drawn("sd3", *control(sd3, controlnext, picture())), expected) > 1e-2


def test_control_enters_a_block_that_skip_layer_guidance_skips(run, sd3, control, controlnext):
    def skipping(model):
        return run("SkipLayerGuidanceDiT", model=model, double_layers="0", single_layers="", scale=3.0,
                   start_percent=0.0, end_percent=1.0, rescaling_scale=0.0)

    model, *prompts = control(sd3, controlnext, picture())
    tokens = []
    with entering("sd3", sd3, 1, lambda picture, _: tokens.append(picture.clone())):
        drawn("sd3", skipping(model), *prompts, cfg=1.0)
        drawn("sd3", skipping(sd3), cfg=1.0)
    assert len(tokens) == 4
    assert relative(tokens[1], tokens[3]) > 1e-2, "the skipped forward went without control"


def test_a_place_that_a_transformer_lacks_is_answered_with_those_that_it_has(sd3, control, controlnext):
    with pytest.raises(ValueError, match=r"^inject_at: small.safetensors gives 192 channels and should enter at "
                                         r"down_0, but the connected MODEL has no such place; set inject_at to "
                                         r"tokens, block_0 or block_1\.$"):
        drawn("sd3", *control(sd3, controlnext, picture(), inject_at="down_0"))
