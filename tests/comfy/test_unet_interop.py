"""UNet weights and control beside the nodes that people combine them with: the result stays the expected one.

Expected is a model that has the weights baked in and whose control is added by a plain torch hook, with the other node
on it: none of this pack's nodes takes part.
"""

import gc
import os
from pathlib import Path

import folder_paths
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample
from models import golden_unet, known_unet, stock_controlnet
from safetensors.torch import save_file
from sampling import cond, sample
from test_unet_loader import differences, full, original, save_lora
from versions import on_older

from controlnext_core.checkpoint import open_checkpoint

MODEL = dict(transformer_depth_middle=1)  # self attention guidance works in the middle block
# With this variable set: the UNet that the goldens were computed with, which takes 12 GB and 5 minutes more.
GOLDEN = bool(os.environ.get("CONTROLNEXT_GOLDEN_INTEROP"))
BOUND = 5e-5 if GOLDEN else 2e-5
SIDE = 16 if GOLDEN else 8  # of the latents


def interop_unet(goldens, seed: int = 0):
    """A small UNet of SD1.5's class, or the golden one; another seed gives other weights."""
    if not GOLDEN:
        return known_unet(seed, **MODEL)
    model = golden_unet(goldens, "sd15")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.model.diffusion_model.parameters() if seed else ():
        parameter.data.add_(0.1 * parameter.data.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def unet(goldens):
    yield interop_unet(goldens)
    gc.collect()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def baked(unet, goldens, image):
    return bake(interop_unet(goldens), goldens, image)


@pytest.fixture
def precise(goldens, image):
    """(unet, baked) in float64, for a node that makes more of the processor's rounding than the bound."""
    return (known_unet(dtype=torch.float64, **MODEL),
            bake(known_unet(dtype=torch.float64, **MODEL), goldens, image.double()))


def bake(model, goldens, image):
    """The expected model: differences in its weights, control from a hook behind the first downsampler."""
    for key, value in differences(model, 0.2).items():
        original(model)[key].add_(value)
    module = open_checkpoint(goldens.state_dict("sd15"), "sd15").load_weights()
    add_by_hook(model, module.to(image.dtype), image)
    return model


def add_by_hook(model, module, image) -> None:
    """The reference's SD1.5 rule: pool, normalize to the UNet's statistics, add; skips stay as they are.

    Features are normalized at the size that the UNet has there by itself; a UNet that is shrunk gets them pooled.
    """
    timesteps = []

    def note(_, args):
        timesteps[:] = [args[1]]

    def add(_, args):
        x = args[0]
        features = module(image.movedim(-1, 1), timesteps[0].float(), 1, False)
        features = F.adaptive_avg_pool2d(features, [size // 16 for size in image.shape[1:3]])
        normal = (features - features.mean((1, 2, 3), keepdim=True)) / features.std((1, 2, 3), keepdim=True)
        normal = F.adaptive_avg_pool2d(normal, x.shape[-2:])
        return (x + normal * x.std((1, 2, 3), keepdim=True) + x.mean((1, 2, 3), keepdim=True), *args[1:])
    model.model.diffusion_model.register_forward_pre_hook(note)
    model.model.diffusion_model.input_blocks[first_downsampler(model) + 1][0].register_forward_pre_hook(add)


def first_downsampler(model) -> int:
    """The input block of a UNet of SD1.5's class after which control enters."""
    blocks = model.model.diffusion_model.input_blocks
    return next(index for index, block in enumerate(blocks) if isinstance(block[0], Downsample))


@pytest.fixture(scope="module")
def with_weights(run, unet, models_folder):
    """with_weights(model): the weights applied by the node."""
    save_file(differences(unet, 0.2), models_folder / "controlnext" / "interop_unet.safetensors")
    return lambda model: run("ControlNeXtUNetLoader", model=model, unet_name="interop_unet.safetensors", strength=1.0,
                             mode="auto")


@pytest.fixture(scope="module")
def with_control(run, goldens, models_folder, image):
    """with_control(model): control applied by the node."""
    save_file(goldens.state_dict("sd15"), models_folder / "controlnext" / "interop.safetensors")
    controlnext = run("ControlNeXtLoader", controlnext_name="interop.safetensors", variant="auto")
    return lambda model: run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, strength=1.0,
                             start_percent=0.0, end_percent=1.0)


def sampled(model, frames: int = 1, **options) -> torch.Tensor:
    positive, negative = options.pop("conds", None) or (cond(model), cond(model, 1))
    latent = torch.zeros(frames, 4, SIDE, SIDE)
    return sample(model, positive, negative, latent, **{"cfg": 3.0, "steps": 1, **options})


def assert_same(one: torch.Tensor, other: torch.Tensor, bound: float = BOUND):
    difference = float((one - other).abs().max() / other.std())
    print(f"{difference:.1e} of the expected std")
    assert difference <= bound


def lora_file(model) -> str:
    save_lora(model, "interop.safetensors", 7)
    return "interop.safetensors"


OTHERS = {
    "LoraLoader": (lambda run, model: run("LoraLoader", model=model, clip=None, lora_name=lora_file(model),
                                          strength_model=1.0, strength_clip=0.0)[0], {}),
    "LoraLoaderModelOnly": (lambda run, model: run("LoraLoaderModelOnly", model=model, lora_name=lora_file(model),
                                                   strength_model=-0.7), {}),
    "FreeU_V2": (lambda run, model: run("FreeU_V2", model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2), {}),
    "HyperTile": (lambda run, model: run("HyperTile", model=model, tile_size=32, swap_size=1, max_depth=0,
                                         scale_depth=False), {}),
    "SelfAttentionGuidance": (lambda run, model: run("SelfAttentionGuidance", model=model, scale=0.5, blur_sigma=2.0),
                              {}),
    "PerturbedAttentionGuidance": (lambda run, model: run("PerturbedAttentionGuidance", model=model, scale=3.0), {}),
    "ModelSamplingDiscrete": (lambda run, model: run("ModelSamplingDiscrete", model=model, sampling="lcm", zsnr=False),
                              {"sampler": "lcm", "steps": 2}),
    "DifferentialDiffusion": (lambda run, model: run("DifferentialDiffusion", model=model, strength=1.0),
                              {"noise_mask": torch.linspace(0, 1, SIDE ** 2).reshape(1, SIDE, SIDE)}),
    "ContextWindowsManual": (lambda run, model: run(
        "ContextWindowsManual", model=model, context_length=2, context_overlap=1, context_schedule="standard_static",
        context_stride=1, closed_loop=False, fuse_method="pyramid", dim=0, freenoise=False), {"frames": 3}),
    "PatchModelAddDownscale": (lambda run, model: run(
        "PatchModelAddDownscale", model=model, block_number=1, downscale_factor=2.0, start_percent=0.0, end_percent=1.0,
        downscale_after_skip=True, downscale_method="bilinear", upscale_method="bilinear"), {}),
}


@pytest.mark.parametrize("name", on_older(OTHERS, ["LoraLoaderModelOnly"]))
def test_the_result_is_the_expected_one_before_and_after(run, unet, baked, with_weights, with_control, name, request):
    other, options = OTHERS[name]
    if name == "DifferentialDiffusion" and not GOLDEN:
        unet, baked = request.getfixturevalue("precise")
    torch.manual_seed(0)
    expected = sampled(other(run, baked), **options)
    for model in (other(run, with_control(with_weights(unet))), with_control(with_weights(other(run, unet)))):
        torch.manual_seed(0)
        assert_same(sampled(model, **options), expected)


def test_without_control_or_without_the_weights_the_result_is_another(unet, baked, with_weights, with_control):
    expected = sampled(baked)
    for missing in (with_control(unet), with_weights(unet)):
        assert float((sampled(missing) - expected).abs().max()) > 1e-2 * float(expected.std())


def test_deep_shrink_at_the_place_of_control_comes_first(run, unet, baked, with_weights, with_control):
    def shrink(model):
        return run("PatchModelAddDownscale", model=model, block_number=first_downsampler(unet), downscale_factor=2.0,
                   start_percent=0.0, end_percent=1.0, downscale_after_skip=True, downscale_method="bilinear",
                   upscale_method="bilinear")
    assert_same(sampled(with_control(shrink(with_weights(unet)))), sampled(shrink(baked)))


def test_merging_the_controlled_model_keeps_control_and_blends_weights(run, unet, baked, with_weights, with_control,
                                                                       goldens):
    other = interop_unet(goldens, seed=8)
    expected = run("ModelMergeSimple", model1=baked, model2=other, ratio=0.7)
    model = run("ModelMergeSimple", model1=with_control(with_weights(unet)), model2=other, ratio=0.7)
    assert_same(sampled(model), sampled(expected))


def test_a_stock_controlnet_on_the_same_sampling(run, unet, baked, with_weights, with_control, models_folder, image):
    save_file(stock_controlnet(unet), models_folder / "controlnet" / "stock.safetensors")
    stock = run("ControlNetLoader", control_net_name="stock.safetensors")

    def conds(model):
        return run("ControlNetApplyAdvanced", positive=cond(model), negative=cond(model, 1), control_net=stock,
                   image=image, strength=1.0, start_percent=0.0, end_percent=1.0)
    model = with_control(with_weights(unet))
    expected = sampled(baked, conds=conds(baked))
    assert_same(sampled(model, conds=conds(model)), expected)
    assert float((sampled(model) - expected).abs().max()) > 1e-2 * float(expected.std())


@pytest.mark.parametrize("file", [differences, full])
def test_a_saved_checkpoint_holds_the_weights_and_samples_the_same(run, unet, with_control, models_folder, file):
    save_file(file(unet), models_folder / "controlnext" / "saved.safetensors")
    model = run("ControlNeXtUNetLoader", model=unet, unet_name="saved.safetensors", strength=0.8, mode="auto")
    model = run("LoraLoaderModelOnly", model=model, lora_name=lora_file(unet), strength_model=1.0)
    folder = Path(folder_paths.get_output_directory()) / "checkpoints"
    folder_paths.add_model_folder_path("checkpoints", str(folder))  # as ComfyUI's main.py does
    prefix = f"checkpoints/{file.__name__}"
    run("CheckpointSave", model=with_control(model), clip=None, vae=None, filename_prefix=prefix)
    name = f"{file.__name__}_00001_.safetensors"
    reloaded, _, _ = run("CheckpointLoaderSimple", ckpt_name=name)
    assert_same(sampled(with_control(reloaded)), sampled(with_control(model)))
    (folder / name).unlink()


def test_torch_compile_runs_the_controlled_model(run, unet, baked, with_weights, with_control, monkeypatch):
    # ComfyUI's own attention for a CPU is traced in dozens of pieces
    monkeypatch.setattr("comfy.ldm.modules.attention.optimized_attention", attention_pytorch)
    monkeypatch.setattr("comfy.ldm.modules.attention.optimized_attention_masked", attention_pytorch)
    # on a CPU this backend traces the whole model alike and spares minutes of C++ compilation
    compiled = run("TorchCompileModel", model=with_control(with_weights(unet)), backend="cudagraphs")
    assert_same(sampled(compiled), sampled(baked), 1e-4)
    torch.compiler.reset()
