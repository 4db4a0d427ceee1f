"""Files: what is a ControlNeXt model, which family, and one sentence for everything else."""

import pytest
import torch

from controlnext_core.checkpoint import open_checkpoint
from controlnext_core.families import FAMILIES, resolve

OTHER_FILES = {
    "a full ControlNet": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a full ControlNet (original)": ["control_model.zero_convs.0.0.weight", "control_model.input_blocks.0.0.weight"],
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "a VAE": ["encoder.conv_in.weight", "decoder.conv_out.weight"],
    "UNet weights": ["down_blocks.0.resnets.0.conv1.weight", "up_blocks.1.attentions.0.proj_in.weight"],
    "a full checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
    "a transformer diffusion model": ["double_blocks.0.img_attn.qkv.weight"],
    "of an unknown kind": ["weight"],
}


@pytest.mark.parametrize("prefix", ["", "module.", "controlnet.", "module.controlnet."])
def test_every_family_is_read_whatever_its_prefix(goldens, released, prefix):
    state_dict = goldens.state_dict(released)
    checkpoint = open_checkpoint({prefix + key: value for key, value in state_dict.items()}, released)
    checkpoint.load_weights()
    assert checkpoint.layout == FAMILIES[released].layout
    assert checkpoint.scale == pytest.approx(goldens.module[released]["scale"]["value"], abs=1e-7)
    assert checkpoint.module.out_channels == state_dict["mid_convs.1.bias"].shape[0]


def test_widths_follow_the_file(goldens):
    """A narrower module than any released one is built from its own shapes."""
    def narrow(shape):
        return tuple(dim // 2 if dim in (64, 128, 256) else dim for dim in shape)
    shapes = goldens.module["sd15"]["state_dict_shapes"]
    state_dict = {key: torch.zeros(narrow(shape)) for key, shape in shapes.items()}
    checkpoint = open_checkpoint(state_dict, "narrow")
    checkpoint.load_weights()
    assert checkpoint.module.frequencies == 64
    assert checkpoint.module.down_res[1].conv1.out_channels == 128


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_files_are_named_for_what_they_are(what):
    with pytest.raises(ValueError, match=f"f.safetensors is not a ControlNeXt model: it is {what.split(' (')[0]}"):
        open_checkpoint({key: torch.zeros(1) for key in OTHER_FILES[what]}, "f.safetensors")


@pytest.mark.parametrize("key", ["down_res.0.conv1.weight", "time_embedding.linear_1.bias", "mid_convs.1.weight",
                                 "down_res.1.norm2.bias", "down_sample.1.conv.weight", "mid_convs.0.0.weight"])
def test_one_wrong_shape_is_named_wherever_it_is(goldens, released, key):
    state_dict = goldens.state_dict(released)
    state_dict[key] = torch.zeros(*state_dict[key].shape[:-1], state_dict[key].shape[-1] + 1)
    expected = list(state_dict[key].shape)
    with pytest.raises(ValueError) as raised:
        open_checkpoint(state_dict, "f.safetensors")
    assert f"tensor {key} has shape {expected}" in str(raised.value)


def test_missing_and_foreign_tensors_are_named(goldens):
    state_dict = goldens.state_dict("sd15")
    del state_dict["down_res.1.conv2.bias"]
    with pytest.raises(ValueError, match="tensor down_res.1.conv2.bias is missing"):
        open_checkpoint(state_dict, "f")
    with pytest.raises(ValueError, match="tensor surprise is not part of any ControlNeXt model"):
        open_checkpoint(goldens.state_dict("sd15") | {"surprise": torch.zeros(1)}, "f")


def test_weights_that_cannot_be_used_are_named(goldens):
    for bad, words in ((torch.zeros(256, dtype=torch.int64), "holds int64 numbers"),
                       (torch.full((256,), float("nan")), "holds NaN or infinite"),
                       (torch.full((256,), float("inf")), "holds NaN or infinite")):
        with pytest.raises(ValueError, match=f"tensor down_res.1.norm2.bias {words}"):
            open_checkpoint(goldens.state_dict("sd15") | {"down_res.1.norm2.bias": bad}, "f")


def test_empty_file_is_said_to_be_empty():
    with pytest.raises(ValueError, match="f holds no tensors"):
        open_checkpoint({}, "f")


def test_variant_that_does_not_fit_the_file_names_those_that_do(goldens):
    checkpoint = open_checkpoint(goldens.state_dict("sd15"), "f")
    for fitting in ("auto", "sd15", "sdxl", "svd", "svd_padded"):
        checkpoint.check_variant(fitting)
    with pytest.raises(ValueError, match="variant: svd_mid was chosen.*sd15, sdxl, svd, svd_padded, sd3 or another;"):
        checkpoint.check_variant("svd_mid")


@pytest.mark.parametrize("layout, variant, base, expected", [
    ("light", "auto", "sd15", "sd15"), ("light", "auto", "sdxl", "sdxl"), ("light", "auto", "svd", "svd"),
    ("light", "svd_padded", "svd", "svd_padded"), ("mid", "auto", "sd15", "sd15_mid"),
    ("video_mid", "auto", "svd", "svd_mid")])
def test_family_is_settled_by_file_variant_and_model(layout, variant, base, expected):
    assert resolve(layout, variant, base).name == expected


@pytest.mark.parametrize("layout, variant, base, words", [
    ("light", "sdxl", "sd15", "is sdxl .for SDXL., but the connected MODEL is SD1.5"),
    ("mid", "auto", "sdxl", "is sd15_mid .for SD1.5., but the connected MODEL is SDXL"),
    ("video_mid", "auto", "sd15", "is svd_mid .for SVD., but the connected MODEL is SD1.5")])
def test_family_for_another_model_is_an_error_that_names_both(layout, variant, base, words):
    with pytest.raises(ValueError, match=words):
        resolve(layout, variant, base)


@pytest.mark.parametrize("name, scale, expected", [
    ("sd15", 1.0, (1.0, 1.0)), ("sd15_mid", 0.8, (0.8, 0.8)), ("sdxl", 1.0, (1.0, 1.0)), ("svd", 1.0, (0.2, 0.0)),
    ("svd_padded", 1.0, (0.2, 0.0)), ("svd_mid", 0.8179811835289001, (0.9019498229026794, 0.65))])
def test_gains_are_the_references(name, scale, expected):
    assert FAMILIES[name].gains(scale) == pytest.approx(expected, abs=2e-7)
