"""Every kind of bad file reaches ComfyUI's error dialog as one sentence, and the server goes on."""

import comfy_client
import pytest
import stand_in
import torch
from safetensors.torch import load_file, save_file


class Bomb:
    def __reduce__(self):
        return print, ("this must not run",)


def without_tensors(path, weights):
    save_file({}, path.with_suffix(".safetensors"))


def zero_length(path, weights):
    path.with_suffix(".safetensors").write_bytes(b"")


def truncated(path, weights):
    save_file(weights, path.with_suffix(".safetensors"))
    path.with_suffix(".safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes()[:50_000])


def broken_header(path, weights):
    path.with_suffix(".safetensors").write_bytes(b"\xff" * 4096)


def code_in_pickle(path, weights):
    torch.save({"down_res.0.norm1.weight": Bomb()}, path.with_suffix(".bin"))


def lora(path, weights):
    save_file({"lora_unet_mid_block.lora_up.weight": torch.zeros(4, 4)}, path.with_suffix(".safetensors"))


def unet_weights(path, weights):
    save_file({"down_blocks.0.attentions.0.proj_in.weight": torch.zeros(4, 4)}, path.with_suffix(".safetensors"))


def vae(path, weights):
    save_file({"encoder.conv_in.weight": torch.zeros(4, 4), "quant_conv.weight": torch.zeros(4)},
              path.with_suffix(".safetensors"))


def integers(path, weights):
    key = "mid_convs.1.bias"
    save_file(weights | {key: weights[key].to(torch.int32)}, path.with_suffix(".safetensors"))


def not_a_number(path, weights):
    key = "mid_convs.1.bias"
    save_file(weights | {key: weights[key] * float("nan")}, path.with_suffix(".safetensors"))


def wrong_shape(path, weights):
    save_file(weights | {"mid_convs.1.bias": torch.zeros(321)}, path.with_suffix(".safetensors"))


BAD_FILES = {
    without_tensors: "holds no tensors", zero_length: "is empty", truncated: "damaged", broken_header: "damaged",
    code_in_pickle: "holds more than weights", lora: "a LoRA", unet_weights: "UNet weights", vae: "a VAE",
    integers: "int32 numbers", not_a_number: "NaN", wrong_shape: "tensor mid_convs.1.bias has shape [321]",
}


def assert_refused(run, where: tuple[str, str], *words: str) -> None:
    """``run()`` is refused in one sentence of a node about its input, ``where``, with these words in it."""
    with pytest.raises(comfy_client.ComfyError) as refused:
        run()
    node, input_name, sentence = str(refused.value).split(": ", 2)
    assert (node, input_name) == where
    assert all(word in sentence for word in words), sentence
    assert sentence.endswith(".")


def load(url, name: str, variant: str = "auto") -> dict:
    """Load ControlNeXt Model and a node that shows what came out."""
    return comfy_client.run_graph(url, {
        "load": {"class_type": "ControlNeXtLoader", "inputs": {"controlnext_name": name, "variant": variant}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}},
    })


@pytest.mark.parametrize("make, words", BAD_FILES.items(), ids=[make.__name__ for make in BAD_FILES])
def test_a_bad_file_is_one_sentence_in_the_dialog_and_the_next_prompt_runs(url, base, make, words):
    folder = base / "models" / "controlnext"
    make(folder / make.__name__, load_file(folder / stand_in.CONTROLNEXT))
    name = next(path.name for path in folder.iterdir() if path.stem == make.__name__)
    assert_refused(lambda: load(url, name), ("ControlNeXtLoader", "controlnext_name"), name, words)
    assert load(url, stand_in.CONTROLNEXT)["show"]
    assert "this must not run" not in (base / "server.log").read_text()


def test_a_variant_that_does_not_fit_the_file_is_one_sentence(url):
    words = r"variant: svd_mid was chosen, but .* choose auto or sd15, .*\.$"
    with pytest.raises(comfy_client.ComfyError, match=words):
        load(url, stand_in.CONTROLNEXT, "svd_mid")


def svd_unet(path, weights):
    save_file({"mid_block.resnets.0.temporal_res_block.norm1.bias": torch.zeros(320)}, path.with_suffix(".safetensors"))


def control_module(path, weights):
    save_file(weights, path.with_suffix(".safetensors"))


def wrong_unet_shape(path, weights):
    save_file({"conv_in.weight": torch.zeros(320, 9, 3, 3)}, path.with_suffix(".safetensors"))


BAD_UNET_FILES = {zero_length: "is empty", code_in_pickle: "holds more than weights", lora: "a LoRA",
                  control_module: "a ControlNeXt model", svd_unet: "UNet weights for SVD",
                  wrong_unet_shape: "tensor input_blocks.0.0.weight has shape [320, 9, 3, 3]"}


@pytest.mark.parametrize("make, words", BAD_UNET_FILES.items(), ids=[make.__name__ for make in BAD_UNET_FILES])
def test_bad_unet_weights_are_one_sentence_in_the_dialog_and_the_next_prompt_runs(url, base, make, words):
    def apply(name: str) -> dict:
        return comfy_client.run_graph(url, {
            "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": stand_in.CHECKPOINT}},
            "load": {"class_type": "ControlNeXtUNetLoader",
                     "inputs": {"model": ["model", 0], "unet_name": name, "strength": 1.0, "mode": "auto"}},
            "show": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}},
        })
    folder = base / "models" / "controlnext"
    make(folder / f"unet_{make.__name__}", load_file(folder / stand_in.CONTROLNEXT))
    save_file({"conv_in.bias": torch.zeros(320)}, folder / "unet_good.safetensors")
    name = next(path.name for path in folder.iterdir() if path.stem == f"unet_{make.__name__}")
    assert_refused(lambda: apply(name), ("ControlNeXtUNetLoader", "unet_name"), name, words)
    assert apply("unet_good.safetensors")["show"]
