"""What control adds to a sampling step, counted by PyTorch's FLOP counter in ComfyUI's own sampler and UNets."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from models import small_unet
from safetensors.torch import save_file
from sampling import cond, sample
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def controlnext(run, goldens, models_folder):
    save_file(goldens.state_dict("sd15"), models_folder / "controlnext" / "speed.safetensors")
    return run("ControlNeXtLoader", controlnext_name="speed.safetensors", variant="auto")


def flops(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


def steps(model, batch: int) -> list[int]:
    """FLOPs of each of two steps with both guidance halves."""
    counted = []

    def sampler(apply, x, sigmas, extra_args=None, **_):
        for sigma in sigmas[:-1]:
            counted.append(flops(apply, x, sigma.expand(len(x)), **extra_args))
        return x
    latent = torch.zeros(batch, 4, 8, 8)
    with torch.inference_mode():
        comfy.sample.sample_custom(model, latent, 7.0, comfy.samplers.KSAMPLER(sampler), torch.tensor([9.0, 2.0, 0.0]),
                                   cond(model, 0), cond(model, 1), latent, disable_pbar=True, seed=1)
    return counted


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_a_step_pays_for_one_run_of_the_module_and_a_second_run_for_none(run, controlnext, monkeypatch, batch, apart):
    """Whether the halves come in one call or two, and whatever the batch: they share the image and the timestep."""
    model = small_unet("sd15")
    if apart:
        monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 1e30)
    alone, = set(steps(model, batch))
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(7 + batch + apart))
    controlled = run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, strength=1.0,
                     start_percent=0.0, end_percent=1.0)
    module, at = controlnext.patcher.model, torch.tensor([1.0])
    with torch.no_grad():
        part = module.image_part(image.movedim(-1, 1), 1, False)
    image_part = flops(module.image_part, image.movedim(-1, 1), 1, False)
    timestep_part = flops(module.timestep_part, part, at, (4, 4))
    assert steps(controlled, batch) == [alone + image_part + timestep_part, alone + timestep_part]
    assert steps(controlled, batch) == [alone, alone]


@pytest.mark.parametrize("place", ["down_0", "before_middle", "middle"])
def test_a_compiled_unet_is_one_graph_traced_once_under_control(run, controlnext, place):
    """Steps, runs, images and strengths all go through the same graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward
    # without attention: ComfyUI's own for a CPU cannot be traced whole
    model = small_unet("sd15", channel_mult=[1, 1], transformer_depth=[0, 0], transformer_depth_output=[0] * 4)
    for seed in range(2):
        image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
        controlled = run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, strength=1.0 - seed / 2,
                         start_percent=0.0, end_percent=1.0, inject_at=place)
        set_torch_compile_wrapper(controlled, backend=backend, fullgraph=True)
        sample(controlled, cond(model, 0), cond(model, 1), torch.zeros(1, 4, 8, 8), cfg=3.0, steps=3, seed=seed)
    assert len(graphs) == 1
