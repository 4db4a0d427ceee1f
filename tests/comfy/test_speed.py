"""What control adds to a sampling step, counted by PyTorch's FLOP counter in ComfyUI's own sampler and UNets."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from models import narrowed, small_unet
from safetensors.torch import save_file
from sampling import cond, one_call_each, picture, sample
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def controlnext(run, goldens, models_folder):
    save_file(narrowed(goldens.state_dict("sd15")), models_folder / "controlnext" / "speed.safetensors")
    return run("ControlNeXtLoader", controlnext_name="speed.safetensors", variant="auto")


def flops(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


@pytest.fixture(params=["model", "conditioning"])
def control(request, apply, hang):
    """control(model, image, ...): (MODEL, positive, negative) under control by one route or the other."""
    def controlled(model, controlnext, image, **settings):
        conds = cond(model, 0), cond(model, 1)
        if request.param == "model":
            return apply(model, controlnext, image, **settings), *conds
        return model, *hang(controlnext, image, *conds, **settings)
    return controlled


def steps(model, positive, negative, batch: int) -> list[int]:
    """FLOPs of each of two steps with both guidance halves."""
    counted = []

    def sampler(apply, x, sigmas, extra_args=None, **_):
        for sigma in sigmas[:-1]:
            counted.append(flops(apply, x, sigma.expand(len(x)), **extra_args))
        return x
    latent = torch.zeros(batch, 4, 8, 8)
    with torch.inference_mode():
        comfy.sample.sample_custom(model, latent, 7.0, comfy.samplers.KSAMPLER(sampler), torch.tensor([9.0, 2.0, 0.0]),
                                   positive, negative, latent, disable_pbar=True, seed=1)
    return counted


@pytest.mark.parametrize("batch, apart", [(1, False), (3, True)])
def test_a_step_pays_for_one_run_of_the_module_and_a_second_run_for_none(control, controlnext, monkeypatch, batch,
                                                                         apart):
    """By either route, with the halves in one call or two, whatever the batch: they share image and timestep."""
    model = small_unet("sd15")
    if apart:
        one_call_each(monkeypatch, model)
    alone, = set(steps(model, cond(model, 0), cond(model, 1), batch))
    controlnext.loaded.features.clear()
    image = picture(7)
    controlled = control(model, controlnext, image)
    module, at = controlnext.patcher.model, torch.tensor([1.0])
    with torch.no_grad():
        part = module.image_part(image.movedim(-1, 1), 1, False)
    image_part = flops(module.image_part, image.movedim(-1, 1), 1, False)
    timestep_part = flops(module.timestep_part, part, at, (4, 4))
    assert steps(*controlled, batch) == [alone + image_part + timestep_part, alone + timestep_part]
    assert steps(*controlled, batch) == [alone, alone]


@pytest.mark.parametrize("place", ["down_0", "before_middle", "middle"])
def test_a_compiled_unet_is_one_graph_traced_once_under_control(control, controlnext, compiler, place):
    """Steps, runs, images and strengths all go through the same graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward
    # without attention: ComfyUI's own for a CPU cannot be traced whole
    model = small_unet("sd15", channel_mult=[1, 1], transformer_depth=[0, 0], transformer_depth_output=[0] * 4)
    for seed in range(2):
        settings = {"strength": 1.0 - seed / 2, "inject_at": place}
        controlled, *conds = control(model.clone(), controlnext, picture(seed), **settings)
        set_torch_compile_wrapper(controlled, backend=backend, fullgraph=True)
        sample(controlled, *conds, torch.zeros(1, 4, 8, 8), cfg=3.0, steps=3, seed=seed)
    assert len(graphs) == 1
