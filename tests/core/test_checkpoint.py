"""Files: what is a ControlNeXt model, which family, and one sentence for everything else."""

import pytest
import torch

from controlnext_core.checkpoint import open_checkpoint
from controlnext_core.families import FAMILIES, family_for
from controlnext_core.module import new_module

OTHER_FILES = {
    "a full ControlNet": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a full ControlNet (original)": ["control_model.zero_convs.0.0.weight", "control_model.input_blocks.0.0.weight"],
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"],
    "a T2I-Adapter": ["adapter.body.0.resnets.0.block1.weight"],
    "a VAE": ["encoder.conv_in.weight", "decoder.conv_out.weight"],
    "UNet weights, which": ["down_blocks.9.resnets.0.conv1.weight", "up_blocks.9.attentions.0.proj_in.weight"],
    "UNet weights for SDXL, which": ["add_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "UNet weights for SD3, which": ["joint_blocks.0.x_block.attn.qkv.weight"],
    "a full checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
    "UNet weights for Flux.1, Chroma, Flux.2 or HunyuanVideo 1.5": ["double_blocks.0.img_attn.qkv.weight"],
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


@pytest.mark.parametrize("file", [{}, {1: torch.zeros(2)}, {"state_dict": None}, {"state_dict": {"x": torch.zeros(2)}}])
def test_a_file_without_named_tensors_says_so(file):
    with pytest.raises(ValueError, match="f holds no tensors with names"):
        open_checkpoint(file, "f")


@pytest.mark.parametrize("prefix", ["controlnext.", "controlnet.", "module.controlnext."])
def test_a_control_beside_its_unet_is_read(goldens, prefix):
    """As DeepSpeed saves both in one file."""
    state_dict = goldens.state_dict("svd_mid")
    unet = {f"{prefix.rpartition('control')[0]}unet.conv_in.weight": torch.zeros(320, 8, 3, 3)}
    checkpoint = open_checkpoint(unet | {prefix + key: value for key, value in state_dict.items()}, "pytorch_model.bin")
    assert checkpoint.layout == "video_mid"
    assert checkpoint.state_dict.keys() == state_dict.keys() - {"scale"}


WITHOUT_NUMBERS = {
    "sparse": lambda tensor: tensor.to_sparse(), "a mere shape": lambda tensor: tensor.to("meta"),
    "repeated": lambda tensor: torch.zeros(1).expand(10 ** 9, 10 ** 9),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor[1:]]),
}


@pytest.mark.parametrize("what", WITHOUT_NUMBERS)
def test_a_tensor_that_does_not_hold_all_its_numbers_is_named(goldens, what):
    file = goldens.state_dict("sd15")
    file["mid_convs.1.weight"] = WITHOUT_NUMBERS[what](file["mid_convs.1.weight"])
    with pytest.raises(ValueError, match="tensor mid_convs.1.weight does not hold all of its numbers"):
        open_checkpoint(file, "f")


@pytest.mark.parametrize("key", ["time_embedding.linear_1.weight", "mid_convs.1.bias", "embedding.0.weight", "scale"])
@pytest.mark.parametrize("shape", [(4,), (1, 1), (0,), (1, 0), (1,) * 300])
def test_a_tensor_of_another_rank_or_of_no_size_is_named(goldens, key, shape):
    with pytest.raises(ValueError, match=f"tensor {key} has shape .* expected; download") as raised:
        open_checkpoint(goldens.state_dict("sd15") | {key: torch.zeros(shape)}, "f")
    assert len(str(raised.value)) < 500


def module(family: str = "sd15", **widths) -> dict:
    return new_module(FAMILIES[family], **widths).state_dict()


NO_MODULE = {  # all their tensors agree
    "time_embedding.linear_1.weight takes 127 frequencies": lambda: module(frequencies=127),
    "down_res.0.conv1.weight takes images of 4 channels": lambda: module("sd15_mid", width_0=4),
    "down_res.1.conv_shortcut.weight is missing": lambda: {
        key: value for key, value in module().items() if "conv_shortcut" not in key},
    "must be divisible by": lambda: module() | {
        "embedding.0.weight": torch.zeros(63, 3, 3, 3), "embedding.3.weight": torch.zeros(64, 63, 3, 3),
        **dict.fromkeys(("embedding.0.bias", "embedding.1.weight", "embedding.1.bias"), torch.zeros(63))},
}


@pytest.mark.parametrize("key", ["time_embedding.linear_2.bias", "down_res.1.time_emb_proj.weight"])
def test_a_file_that_has_the_layers_of_time_has_all_of_them(key):
    file = module()
    del file[key]
    with pytest.raises(ValueError, match=f"tensor {key} is missing"):
        open_checkpoint(file, "f")


@pytest.mark.parametrize("words", NO_MODULE)
def test_widths_that_no_module_can_have_are_an_error(words):
    with pytest.raises(ValueError, match=f"f does not fit any ControlNeXt model: .*{words}"):
        open_checkpoint(NO_MODULE[words](), "f")


def test_a_stage_of_any_number_is_an_error_at_once(goldens):
    with pytest.raises(ValueError, match=r"tensor down_res.2.norm1.weight \(and 11 more\) is missing"):
        open_checkpoint(goldens.state_dict("sd15") | {f"down_res.{'9' * 5000}.norm1.weight": torch.zeros(1)}, "f")


def test_long_and_unprintable_names_are_quoted_short_and_on_one_line(goldens):
    for key in ("x" * 5000, "a\nb\x00\ud800"):
        for file in ({key: torch.zeros(1)}, goldens.state_dict("sd15") | {key: torch.zeros(1)},
                     goldens.state_dict("sd15") | {key: torch.zeros(1, dtype=torch.int8)}):
            with pytest.raises(ValueError) as raised:
                open_checkpoint(file, "folder/" * 100 + "f.bin")
            assert len(str(raised.value)) < 500
            assert str(raised.value).isprintable()


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
    assert family_for(layout, variant, base).name == expected


@pytest.mark.parametrize("layout, variant, base, words", [
    ("light", "sdxl", "sd15", "is sdxl .for SDXL., but the connected MODEL is SD1.5"),
    ("mid", "auto", "sdxl", "is sd15_mid .for SD1.5., but the connected MODEL is SDXL"),
    ("video_mid", "auto", "sd15", "is svd_mid .for SVD., but the connected MODEL is SD1.5")])
def test_family_for_another_model_is_an_error_that_names_both(layout, variant, base, words):
    with pytest.raises(ValueError, match=words):
        family_for(layout, variant, base)


@pytest.mark.parametrize("name, scale, expected", [
    ("sd15", 1.0, (1.0, 1.0)), ("sd15_mid", 0.8, (0.8, 0.8)), ("sdxl", 1.0, (1.0, 1.0)), ("svd", 1.0, (0.2, 0.0)),
    ("svd_padded", 1.0, (0.2, 0.0)), ("svd_mid", 0.8179811835289001, (0.9019498229026794, 0.65))])
def test_gains_are_the_references(name, scale, expected):
    assert FAMILIES[name].gains(scale) == pytest.approx(expected, abs=2e-7)
