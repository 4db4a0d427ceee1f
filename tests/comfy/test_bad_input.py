"""Bad input gives one sentence that names the input, what was found and what to do."""

import pickle
import re

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from models import IS_NEWER, SMALL, WIDTH, narrowed, small_sd3, small_unet, transformer_model, unet_model
from safetensors.torch import save, save_file


class Bomb:
    """A pickle that would leave a trace if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def weights(goldens):
    return goldens.state_dict("sd15")


@pytest.fixture(scope="module")
def sd15():
    return small_unet("sd15", channel_mult=[1, 2])


@pytest.fixture
def loader(run, models_folder):
    def load(name: str, variant: str = "auto"):
        return run("ControlNeXtLoader", controlnext_name=name, variant=variant)
    load.folder = models_folder / "controlnext"
    return load


@pytest.fixture
def apply(run, models_folder, goldens):
    def apply_node(model, family="sd15", variant="auto", image=None, start_percent=0.0, end_percent=1.0, **optional):
        name = f"{family}.safetensors"
        save_file(narrowed(goldens.state_dict(family)), models_folder / "controlnext" / name)
        controlnext = run("ControlNeXtLoader", controlnext_name=name, variant=variant)
        image = torch.zeros(1, 64, 64, 3) if image is None else image
        return run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, strength=1.0,
                   start_percent=start_percent, end_percent=end_percent, **optional)
    return apply_node


def one_sentence(raised) -> str:
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 350
    assert re.match(r"[a-z_]+: ", message), "it begins with the input's name"
    return message


OTHER_FILES = {
    "a full ControlNet": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "down_blocks.0.x.weight": (4,)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": (4, 4)},
    "UNet weights": {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight": (4, 4)},
    "a VAE": {"encoder.conv_in.weight": (4, 4), "decoder.conv_in.weight": (4, 4)},
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_another_kind_of_file_is_named(loader, what):
    tensors = {key: torch.zeros(shape) for key, shape in OTHER_FILES[what].items()}
    save_file(tensors, loader.folder / "other.safetensors")
    with pytest.raises(ValueError) as raised:
        loader("other.safetensors")
    assert f"other.safetensors is not a ControlNeXt model: it is {what}" in one_sentence(raised)


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_files_of_zero_length_are_empty(loader, suffix):
    (loader.folder / f"zero.{suffix}").write_bytes(b"")
    with pytest.raises(ValueError) as raised:
        loader(f"zero.{suffix}")
    assert "is empty (0 bytes)" in one_sentence(raised)


def test_a_file_without_tensors_says_so(loader):
    save_file({}, loader.folder / "none.safetensors")
    with pytest.raises(ValueError) as raised:
        loader("none.safetensors")
    assert "holds no tensors" in one_sentence(raised)


@pytest.mark.parametrize("keep", [5, 200, 100_000])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_files_are_said_to_be_damaged(loader, weights, suffix, keep):
    path = loader.folder / f"cut.{suffix}"
    if suffix == "bin":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError) as raised:
        loader(path.name)
    assert "damaged" in one_sentence(raised)


@pytest.mark.parametrize("header", [b"\xff" * 64, (100).to_bytes(8, "little") + b"{" * 100, b"GGUF" * 20])
def test_broken_headers_are_said_to_be_damaged(loader, weights, header):
    (loader.folder / "header.safetensors").write_bytes(header + save(weights)[200:1000])
    with pytest.raises(ValueError) as raised:
        loader("header.safetensors")
    assert "damaged" in one_sentence(raised)


@pytest.mark.parametrize("suffix", ["bin", "pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(loader, tmp_path, suffix, zipped):
    trace = tmp_path / "ran"
    path = loader.folder / f"bomb.{suffix}"
    if zipped:
        torch.save({"x": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Bomb(trace)}))
    with pytest.raises(ValueError) as raised:
        loader(path.name)
    assert "holds more than weights, so it was not opened" in one_sentence(raised)
    assert not trace.exists()


def test_a_pickle_of_something_else_is_an_error(loader):
    torch.save([1, 2, 3], loader.folder / "list.pt")
    with pytest.raises(ValueError) as raised:
        loader("list.pt")
    assert "holds a list where named weights are expected" in one_sentence(raised)


@pytest.mark.parametrize("bad, words", [(torch.zeros(256, dtype=torch.int32), "int32 numbers"),
                                        (torch.full((256,), float("nan")), "NaN or infinite weights"),
                                        (torch.zeros(257), "tensor down_res.1.norm2.bias has shape [257] where [256]")])
def test_unusable_weights_are_named(loader, weights, bad, words):
    save_file(weights | {"down_res.1.norm2.bias": bad}, loader.folder / "bad.safetensors")
    with pytest.raises(ValueError) as raised:
        loader("bad.safetensors")
    message = one_sentence(raised)
    assert words in message
    assert "down_res.1.norm2.bias" in message


def test_a_missing_file_names_the_folders(loader):
    with pytest.raises(FileNotFoundError) as raised:
        loader("nowhere.safetensors")
    assert "nowhere.safetensors was not found in models/controlnext or models/controlnet" in one_sentence(raised)


def test_a_variant_that_does_not_fit_the_file_names_those_that_do(loader, weights):
    save_file(weights, loader.folder / "light.safetensors")
    with pytest.raises(ValueError) as raised:
        loader("light.safetensors", variant="svd_mid")
    assert "svd_mid was chosen" in one_sentence(raised)


def test_a_variant_for_another_model_names_both(apply, sd15):
    with pytest.raises(ValueError) as raised:
        apply(sd15, variant="sdxl")
    message = one_sentence(raised)
    assert "sdxl" in message
    assert "the connected MODEL is SD1.5" in message


def test_a_file_on_a_model_that_is_wider_at_its_place_says_so(apply, sd15):
    with pytest.raises(ValueError) as raised:
        apply(sd15, family="sd15_mid")
    message = one_sentence(raised)
    assert "gives 64 channels and should enter at middle" in message
    assert "is 128 channels wide there; set inject_at to conv_in or down_0" in message


def test_inject_at_of_another_width_says_which_places_fit(apply, sd15):
    with pytest.raises(ValueError) as raised:
        apply(sd15, inject_at="middle")
    assert "set inject_at to conv_in or down_0" in one_sentence(raised)
    with pytest.raises(ValueError) as raised:
        apply(sd15, inject_at="down_2")
    assert "has no such place" in one_sentence(raised)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_with_nan_is_an_error(run, apply, sd15, value):
    image = torch.zeros(1, 64, 64, 3)
    image[0, 3, 3, 1] = value
    with pytest.raises(ValueError) as raised:
        apply(sd15, image=image)
    assert "image: " in one_sentence(raised)
    with pytest.raises(ValueError) as raised:
        run("ControlNeXtCanny", image=image, threshold="auto", low_threshold=100, high_threshold=200)
    assert "image: " in one_sentence(raised)


@pytest.mark.parametrize("start, end", [(0.5, 0.5), (0.8, 0.2)])
def test_start_not_before_end_is_an_error(apply, sd15, start, end):
    with pytest.raises(ValueError) as raised:
        apply(sd15, start_percent=start, end_percent=end)
    assert f"start_percent: {start:g} is not before end_percent {end:g}" in one_sentence(raised)


def test_a_model_of_no_known_base_is_not_supported_yet(apply):
    with pytest.raises(ValueError) as raised:
        apply(transformer_model("HunyuanVideo"))
    assert "model: the connected MODEL is HunyuanVideo, which is not supported yet" in one_sentence(raised)


@pytest.mark.versions
@pytest.mark.parametrize("kind, why", [
    ("Kandinsky5", "ComfyUI cannot call its blocks where they are replaced"),
    *([] if IS_NEWER else [("Anima", "this version of ComfyUI calls no patch before its blocks")])])
def test_a_model_that_control_has_no_way_into_is_refused_with_the_reason(apply, kind, why):
    with pytest.raises(ValueError) as raised:
        apply(transformer_model(kind))
    assert f"control has no way into the connected MODEL, which is {kind}: {why}" in one_sentence(raised)


LOOK_ALIKES = {  # {ComfyUI's class: (what it is built like, what differs, its name)}
    "SD20": ("sd15", dict(context_dim=1024), "SD2"),
    "SD21UnclipL": ("sd15", dict(context_dim=1024, adm_in_channels=1536, num_classes="sequential"), "SD2.1 unCLIP"),
    "SD_X4Upscaler": ("sd15", dict(context_dim=1024, in_channels=7, num_classes=1000, num_res_blocks=[1] * 4,
                                   channel_mult=[1] * 4, transformer_depth=[0, 1, 1, 1],
                                   transformer_depth_output=[0, 0, 1, 1, 1, 1, 1, 1]), "SD x4 upscaler"),
    "LotusD": ("sd15", dict(context_dim=1024, adm_in_channels=4, num_classes="sequential"), "Lotus"),
    "Stable_Zero123": ("sd15", dict(in_channels=8), "Stable Zero123"),
    "SDXLRefiner": ("sdxl", dict(context_dim=1280, adm_in_channels=2560), "SDXL refiner"),
    "SSD1B": ("sdxl", {}, "SSD-1B"), "Segmind_Vega": ("sdxl", {}, "Segmind Vega"), "KOALA_1B": ("sdxl", {}, "KOALA"),
    "SV3D_u": ("svd", dict(adm_in_channels=256), "SV3D"), "SV3D_p": ("svd", dict(adm_in_channels=1280), "SV3D"),
    "SD15": ("sd15", dict(context_dim=1024), "SD15 with a context of 1024"),
}


@pytest.mark.versions
@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_a_model_that_is_built_like_a_base_is_refused_by_its_name(run, apply, loader, kind):
    base, changes, name = LOOK_ALIKES[kind]
    model = unet_model(base, kind=getattr(comfy.supported_models, kind), **SMALL | changes)
    save_file({"conv_in.bias": torch.zeros(WIDTH)}, loader.folder / "unet.safetensors")
    for refused in (lambda: apply(model, family=base),
                    lambda: run("ControlNeXtUNetLoader", model=model, unet_name="unet.safetensors", strength=1.0,
                                mode="auto"),
                    lambda: run("ControlNeXtSaveAsLoRA", model=model, unet_name="unet.safetensors", rank=0,
                                filename_prefix="refused")):
        with pytest.raises(ValueError) as raised:
            refused()
        assert f"the connected MODEL is {name}, which is not supported yet; connect one of" in one_sentence(raised)


@pytest.mark.parametrize("base, changes", [
    ("sd15", dict(in_channels=9)), ("sdxl", dict(in_channels=9)),  # inpainting
    ("sd15", dict(in_channels=8, kind=comfy.supported_models.SD15_instructpix2pix)),
    ("sdxl", dict(in_channels=8, kind=comfy.supported_models.SDXL_instructpix2pix)),
])
def test_models_of_a_base_that_take_a_picture_beside_the_noise_are_controlled(run, apply, loader, base, changes):
    model = unet_model(base, **SMALL | changes)
    save_file({"conv_in.bias": torch.zeros(WIDTH)}, loader.folder / "unet.safetensors")
    assert apply(model, family=base).model is model.model
    assert run("ControlNeXtUNetLoader", model=model, unet_name="unet.safetensors", strength=1.0, mode="auto").patches


@pytest.mark.parametrize("node, name", [("ControlNeXtLoader", "controlnext_name"),
                                        ("ControlNeXtUNetLoader", "unet_name")])
def test_a_name_of_any_length_is_quoted_short(run, sd15, node, name):
    inputs = {"variant": "auto"} if node == "ControlNeXtLoader" else dict(model=sd15, strength=1.0, mode="auto")
    with pytest.raises(FileNotFoundError) as raised:
        run(node, **{name: "a\nb/" * 2000 + ".bin"}, **inputs)
    one_sentence(raised)


def test_a_file_that_must_not_be_read_says_so(pack, tmp_path):
    """A folder, which the system refuses to open as it does a locked file."""
    with pytest.raises(ValueError) as raised:
        pack("nodes.runtime.files").read_weights(str(tmp_path), "locked.safetensors", "unet_name")
    assert "unet_name: locked.safetensors cannot be opened (" in one_sentence(raised)


def test_a_mode_that_is_no_choice_lists_the_choices(run, loader, sd15):
    save_file({"conv_in.bias": torch.zeros(WIDTH)}, loader.folder / "unet.safetensors")
    with pytest.raises(ValueError) as raised:
        run("ControlNeXtUNetLoader", model=sd15, unet_name="unet.safetensors", strength=1.0, mode="x")
    assert "one of auto, difference, replace is expected" in one_sentence(raised)


def test_a_file_for_a_unet_does_not_fit_a_transformer(apply):
    with pytest.raises(ValueError) as raised:
        apply(small_sd3())
    assert ("sd15.safetensors gives 64 channels and should enter at tokens, but the connected MODEL is 192 channels "
            "wide there; none of its places fits") in one_sentence(raised)
    with pytest.raises(ValueError) as raised:
        apply(small_sd3(), variant="sdxl")
    assert "the ControlNeXt file is sdxl (for SDXL), but the connected MODEL is SD3" in one_sentence(raised)


def test_a_transformer_s_file_does_not_fit_a_unet(sd15, apply):
    with pytest.raises(ValueError) as raised:
        apply(sd15, variant="sd3")
    assert "the ControlNeXt file is sd3 (for SD3), but the connected MODEL is SD1.5" in one_sentence(raised)
