import pytest
import torch

from controlnext_core.unet_weights import compare, lora_key, low_rank, match_weights, move_to_base, split_patches

# a UNet with two levels of one block each, cut down to one tensor of each kind
SHAPES = {
    "time_embed.0.weight": (128, 32),
    "input_blocks.0.0.weight": (32, 4, 3, 3),
    "input_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight": (32, 32),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias": (32,),
    "input_blocks.2.0.op.weight": (32, 32, 3, 3),
    "input_blocks.3.0.in_layers.2.weight": (64, 32, 3, 3),
    "middle_block.2.out_layers.3.weight": (64, 64, 3, 3),
    "output_blocks.0.0.skip_connection.weight": (64, 128, 1, 1),
    "output_blocks.1.1.conv.weight": (64, 64, 3, 3),
    "output_blocks.2.0.in_layers.0.weight": (96,),
    "out.2.weight": (4, 32, 3, 3),
}
DIFFUSERS = {
    "time_embedding.linear_1.weight": "time_embed.0.weight",
    "conv_in.weight": "input_blocks.0.0.weight",
    "down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight":
        "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight",
    "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.2.0.op.weight",
    "down_blocks.1.resnets.0.conv1.weight": "input_blocks.3.0.in_layers.2.weight",
    "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
    "up_blocks.0.resnets.0.conv_shortcut.weight": "output_blocks.0.0.skip_connection.weight",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.1.1.conv.weight",
    "up_blocks.1.resnets.0.norm1.weight": "output_blocks.2.0.in_layers.0.weight",
    "conv_out.weight": "out.2.weight",
}


def tensors_of(names) -> dict:
    """{name: random tensor of the shape that the LDM key of this name has}."""
    return {name: torch.randn(SHAPES[DIFFUSERS.get(name, name)]) for name in names}


def test_diffusers_names_are_found():
    file = tensors_of(DIFFUSERS)
    weights = match_weights(file, "unet.bin", SHAPES)
    assert {name: weights.tensors[DIFFUSERS[name]] is file[name] for name in file} == dict.fromkeys(file, True)
    assert weights.left_out == []


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "module.", "unet."])
@pytest.mark.parametrize("names", [SHAPES, DIFFUSERS], ids=["ldm", "diffusers"])
def test_prefixes_are_taken_off(prefix, names):
    weights = match_weights({prefix + name: value for name, value in tensors_of(names).items()}, "unet.bin", SHAPES)
    assert weights.tensors.keys() == {DIFFUSERS.get(name, name) for name in names}


def test_prefixes_are_taken_off_a_full_checkpoint():
    file = {f"model.diffusion_model.{name}": value for name, value in tensors_of(SHAPES).items()}
    file |= {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    weights = match_weights(file, "model.safetensors", SHAPES)
    assert weights.tensors.keys() == SHAPES.keys()
    assert weights.left_out == ["first_stage_model.encoder.conv_in.weight"]


def test_keys_that_the_model_lacks_are_reported():
    file = tensors_of(["conv_in.weight"]) | {"down_blocks.9.resnets.0.conv1.weight": torch.zeros(1)}
    assert match_weights(file, "unet.bin", SHAPES).left_out == ["down_blocks.9.resnets.0.conv1.weight"]


def test_a_text_encoder_beside_the_weights_does_not_make_them_another_base_s():
    text = {"cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8)}
    file = {f"model.diffusion_model.{name}": value for name, value in tensors_of(SHAPES).items()}
    assert match_weights(file | text, "v1-5.safetensors", SHAPES).left_out == list(text)


@pytest.mark.parametrize("keys, what", [
    (["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"], "a LoRA"),
    (["unet.down_blocks.0.attentions.0.proj_in.lora.up.weight"], "a LoRA"),
    (["diffusion_model.input_blocks.0.0.diff"], "a LoRA"),
    (["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"], "a full ControlNet"),
    (["conv_in.weight", "controlnet_down_blocks.0.weight"], "a full ControlNet"),
    (["embedding.0.weight", "down_res.0.conv1.weight", "down_sample.0.conv.weight", "mid_convs.1.weight",
      "time_embedding.linear_1.weight"], "a ControlNeXt model"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE"),
    (["joint_blocks.0.x_block.attn.qkv.weight"], "UNet weights for SD3"),
    (["down_blocks.9.resnets.0.temporal_res_block.conv1.weight"], "UNet weights for SVD"),
    (["down_blocks.9.attentions.0.proj_in.weight"], "UNet weights of another kind of model"),
    (["something.else"], "of an unknown kind"),
])
def test_a_file_without_unet_weights_is_told_for_what_it_is(keys, what):
    file = {key: torch.zeros(32, 4, 3, 3) for key in keys}
    message = f"^x.bin holds no UNet weights for the connected MODEL: it is {what}.*; choose "
    with pytest.raises(ValueError, match=message):
        match_weights(file, "x.bin", SHAPES)


def test_weights_for_another_base_are_an_error_that_names_both():
    file = tensors_of(["conv_in.weight"]) | {"add_embedding.linear_1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="x.bin holds UNet weights for SDXL, but the connected MODEL is SD1.5; conn"):
        match_weights(file, "x.bin", SHAPES)


def test_weights_that_fit_but_look_made_for_another_base_are_noted():
    video = {"input_blocks.1.1.time_mixer.mix_factor": (1,)}
    assert match_weights(tensors_of(DIFFUSERS), "x.bin", SHAPES | video).other_base == "SD1.5"
    assert match_weights(tensors_of(DIFFUSERS), "x.bin", SHAPES).other_base is None


def test_another_shape_is_an_error_that_names_the_tensor():
    file = tensors_of(DIFFUSERS) | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}
    with pytest.raises(ValueError, match=r"tensor input_blocks.0.0.weight has shape \[32, 9, 3, 3\] where the "
                                         r"connected MODEL has \[32, 4, 3, 3\]; choose"):
        match_weights(file, "x.bin", SHAPES)


@pytest.mark.parametrize("bad, found", [(torch.zeros(4, 32, 3, 3, dtype=torch.int8), "int8 numbers"),
                                        (torch.full((4, 32, 3, 3), torch.nan).half(), "NaN or infinite weights"),
                                        (torch.full((4, 32, 3, 3), torch.inf), "NaN or infinite weights")])
def test_integer_and_non_finite_weights_are_errors_that_name_the_tensor(bad, found):
    with pytest.raises(ValueError, match=f"x.bin: tensor out.2.weight holds {found}.*; download"):
        match_weights(tensors_of(DIFFUSERS) | {"conv_out.weight": bad}, "x.bin", SHAPES)


@pytest.mark.parametrize("scale", ["scaled_fp8", "out.0.scale_weight", "out.0.comfy_quant"])
def test_quantised_weights_are_an_error(scale):
    with pytest.raises(ValueError, match="x.bin is quantised .* take the same weights in fp16"):
        match_weights({"out.0.weight": torch.zeros(2), scale: torch.ones(1)}, "x.bin", {"out.0.weight": (2,)})


@pytest.mark.parametrize("file", [{"step": 1000}, {1: torch.zeros(1)}, {"x": {"conv_in.weight": torch.zeros(1)}}])
def test_a_file_without_named_tensors_is_an_error(file):
    with pytest.raises(ValueError, match="x.bin holds no tensors with names"):
        match_weights(file, "x.bin", SHAPES)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_unet_weights_beside_their_control_are_read(prefix):
    """As DeepSpeed saves both in one file."""
    file = {f"{prefix}unet.{name}": value for name, value in tensors_of(DIFFUSERS).items()}
    control = {f"{prefix}controlnext.mid_convs.1.bias": torch.zeros(1)}
    weights = match_weights(file | control, "pytorch_model.bin", SHAPES)
    assert weights.tensors.keys() == set(DIFFUSERS.values())
    assert weights.left_out == []


@pytest.mark.parametrize("bad", [torch.eye(4).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(1).expand(9, 9),
                                 torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])])
def test_a_tensor_that_does_not_hold_all_its_numbers_is_named(bad):
    with pytest.raises(ValueError, match="tensor out.2.weight does not hold all of its numbers"):
        match_weights(tensors_of(DIFFUSERS) | {"conv_out.weight": bad}, "x.bin", SHAPES)


@pytest.mark.parametrize("key", ["x" * 5000, "a\nb\x00\ud800"])
def test_long_and_unprintable_names_are_quoted_short_and_on_one_line(key):
    for file, shapes in (({key: torch.zeros(1)}, SHAPES), ({key: torch.zeros(1)}, {key: (2,)}),
                         ({key: torch.zeros([1] * 500)}, {key: (2,)}), ({key: torch.ones(1) / 0}, {key: (1,)})):
        with pytest.raises(ValueError) as raised:
            match_weights(file, "folder/" * 100 + "x.bin", shapes)
        assert len(str(raised.value)) < 500
        assert str(raised.value).isprintable()


@pytest.mark.parametrize("change, mode", [
    (lambda w: 0.05 * torch.randn_like(w) / 32 ** 0.5, "difference"),
    (lambda w: w + 0.1 * torch.randn_like(w), "replace"),
    (lambda w: (w + 0.1 * torch.randn_like(w)).half(), "replace"),
    (lambda w: -0.01 * w, "difference"),
    (lambda w: 0.01 * w, "difference"),
    (lambda w: torch.zeros_like(w), "difference"),
])
def test_the_values_decide_between_difference_and_replacement(change, mode):
    base = {str(index): torch.randn(32, 32) for index in range(40)} | {"bias": torch.zeros(32)}
    assert compare({key: change(value) for key, value in base.items()}, base.get).mode == mode


def test_only_a_sample_is_compared():
    asked = []

    def base_weight(key):
        asked.append(key)
        return torch.ones(2, 2)
    compare({str(index): torch.ones(2, 2) for index in range(700)}, base_weight)
    assert 8 <= len(asked) <= 16
    assert int(asked[-1]) - int(asked[0]) > 600


def apply(patches, weight):
    for strength, value, strength_model, _, _ in patches:
        weight = weight * strength_model + strength * value
    return weight


def test_a_replacement_goes_below_loras_whatever_the_order():
    lora, other, file = (1.0, 100.0, 1.0, None, None), (0.5, 20.0, 1.0, None, None), (0.25, 8.0, 0.75, None, None)
    assert move_to_base([lora, other, file]) == [file, lora, other]


def test_splitting_patches_keeps_the_weight():
    patches = [(1.0, 3.0, 1.0, None, None), (0.4, 5.0, 0.6, None, None), (2.0, 7.0, 1.0, None, None),
               (0.5, 11.0, 0.5, None, None), (0.1, 13.0, 1.0, None, None)]
    base, additions = split_patches(patches)
    assert [patch[1] for patch in base] == [5.0, 11.0]
    assert apply([*base, *additions], 17.0) == pytest.approx(apply(patches, 17.0))


def test_lora_files_get_comfyui_names():
    assert lora_key("input_blocks.1.0.in_layers.2.weight") == "diffusion_model.input_blocks.1.0.in_layers.2.diff"
    assert lora_key("input_blocks.1.0.in_layers.2.bias") == "diffusion_model.input_blocks.1.0.in_layers.2.diff_b"
    assert lora_key("input_blocks.1.1.time_mixer.mix_factor") == (
        "diffusion_model.input_blocks.1.1.time_mixer.mix_factor.diff")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 8, 3, 3), (24, 8, 3, 1, 1), (40, 2, 3, 3)])
def test_low_rank_is_the_closest_product(shape):
    difference = torch.randn(shape)
    singular = torch.linalg.svdvals(difference.flatten(1))
    for rank in (1, 5, len(singular), 1000):
        up, down = low_rank(difference, rank)
        assert up.shape == (shape[0], min(rank, len(singular)), *[1] * (len(shape) - 2))
        assert down.shape == (min(rank, len(singular)), *shape[1:])
        error = (difference.flatten(1) - up.flatten(1) @ down.flatten(1)).norm()
        torch.testing.assert_close(error, singular[rank:].norm(), rtol=1e-4, atol=1e-4)


def test_low_rank_of_a_difference_with_fewer_ranks_than_asked_is_exact_and_finite_in_half_precision():
    difference = 1e-3 * torch.randn(64, 2) @ torch.randn(2, 96)
    up, down = (part.half().float() for part in low_rank(difference, 8))
    assert float((up @ down - difference).norm() / difference.norm()) < 1e-3
    up, down = low_rank(torch.zeros(8, 8), 2)
    assert torch.equal(up @ down, torch.zeros(8, 8))
