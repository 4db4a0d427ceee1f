"""Whether control on a GPU is right: beside the reference's numbers, in half precision, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import models
import sampling
import tokens
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from golden_forwards import BASES, BOUND, controlled, difference
from goldens import Goldens
from on_gpu.device import CUDA, DEVICE
from on_gpu.figures import Work
from safetensors.torch import save_file

from controlnext_core.checkpoint import open_checkpoint
from controlnext_core.families import FAMILIES

MODULE_BOUND = 5e-5  # as a CPU holds it
BARE, ROUTES = "bare", ("MODEL", "conditioning")
ROUNDING = 1.5  # how much more control may round than the base itself does
COMPILED = ("sd15", "sdxl", "flux", "sd3", "wan", "z_image", "svd", "qwen_image", "chroma", "flux2")
SMALL = ("sd15",)  # families of a dry run, and those that it compiles
SMALL_COMPILED = ("wan",)


def goldens(work: Work) -> None:
    """The module, and full-size UNets under control, in float32 without TF32, beside the reference implementation's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    known = Goldens()
    for family in [FAMILIES[SMALL[0]]] if work.small else [one for one in FAMILIES.values() if one.released]:
        module = open_checkpoint(known.state_dict(family.name), family.name).load_weights().to(DEVICE)
        work.note(f"module of {family.name}, largest difference, of the std", module_difference(known, family, module),
                  most=MODULE_BOUND)
    if not work.small:  # the others need gigabytes and minutes
        unet_goldens(work, known)


def module_difference(known, family, module: torch.nn.Module) -> float:
    """The largest difference of a module's features from the reference's, over its cases."""
    found = []
    for case in known.module[family.name]["cases"]:
        image = known.input(case["image"]).to(DEVICE)
        image = image.flatten(0, 1) if image.ndim == 5 else image
        timestep = torch.tensor([float(case["timestep"])], device=DEVICE)
        with torch.no_grad():
            features = module(image, timestep, family.stem_padding, family.stem_pool)
        found.append(known.difference("module.safetensors", case["output"], features.float().cpu()))
    return max(found)


def unet_goldens(work: Work, known) -> None:
    """Full-size UNets under control."""
    for base, families in BASES.items():
        unet = models.golden_unet(known, base)
        for family in families:
            for case in known.unet[family]["cases"]:
                for output, strength in (("on", 1.0), ("half", 0.5)):
                    model = controlled(work.pack.run, known, work.pack.models, unet, family, case, strength)
                    work.note(f"{case['name']} {output}, largest difference, of the std",
                              difference(known, base, model, case, output), most=BOUND[base])
        comfy.model_management.unload_all_models()
        del unet, model


def precision(work: Work) -> None:
    """What control changes in float16 and bfloat16, beside float32, for all families, by both routes."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    families = every_family(work)
    for name in SMALL if work.small else families:
        base, make_model, controlnext = families[name]
        full = drawn_by(work, base, make_model(torch.float32), controlnext)
        for dtype in (torch.float16, torch.bfloat16):
            half = drawn_by(work, base, make_model(dtype), controlnext)
            short, rounding = str(dtype).removeprefix("torch."), apart(half[BARE], full[BARE])
            work.note(f"{name} {short}: finite", all(bool(torch.isfinite(one).all()) for one in half.values()),
                      wanted=True)
            for route in ROUTES:
                work.note(f"{name} {short} by {route}: rounding under control, of the base's own",
                          apart(half[route], full[route]) / rounding, most=ROUNDING, base=rounding,
                          of_what_control_changes=apart(half[route] - half[BARE], full[route] - full[BARE]))


def every_family(work: Work) -> dict[str, tuple]:
    """{family: (base, function that makes the base's small MODEL in a dtype, CONTROLNEXT)}."""
    known = Goldens()
    found = {}

    def of_unet(base: str) -> Callable:
        return lambda dtype: models.small_unet(base, dtype)

    def of_transformer(base: str) -> Callable:
        return lambda dtype: models.small_transformer(base, dtype)

    for family, base in sampling.FAMILIES.items():
        file = work.pack.models / "controlnext" / f"small_{family}.safetensors"
        save_file(models.narrowed(known.state_dict(family)), file)
        loaded = work.pack.run("ControlNeXtLoader", controlnext_name=file.name, variant=family)
        found[family] = base, of_unet(base), loaded
    for base in tokens.BASES:
        found[base] = base, of_transformer(base), tokens.new_controlnext(work.pack.module, base)
    return found


def drawn_by(work: Work, base: str, model, controlnext) -> dict[str, torch.Tensor]:
    """{BARE or a route: a latent after one step}, without control and with it."""
    prompts, image = sampling.conds(model, base), sampling.picture()
    settings = dict(strength=1.0, start_percent=0.0, end_percent=1.0)
    controlled = work.pack.run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, **settings)
    control_net = work.pack.run("ControlNeXtToControlNet", controlnext=controlnext)
    hung = work.pack.run("ControlNetApplyAdvanced", positive=prompts[0], negative=prompts[1], control_net=control_net,
                         image=image, **settings)
    size = latent_of(base)
    asked = zip((BARE, *ROUTES), (model, controlled, model), (prompts, prompts, hung), strict=True)
    return {name: sampling.sample(one, *conds, size, cfg=3.0, steps=1).float() for name, one, conds in asked}


def latent_of(base: str) -> torch.Tensor:
    """A latent of ``sampling.picture()``'s size."""
    ratio = tokens.BASES[base].ratio if base in tokens.BASES else 8
    return sampling.latent(base, 1, 64 // ratio, 64 // ratio)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def compiled(work: Work) -> None:
    """One graph for all steps, seeds and strengths under torch.compile, with the picture as without it."""
    backend, dtype = ("inductor", torch.bfloat16) if CUDA else ("eager", torch.float32)
    families = every_family(work)
    for name in SMALL_COMPILED if work.small else COMPILED:
        base, make_model, controlnext = families[name]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, drawn = make_model(dtype), []
        for seed in range(2):
            controlled = work.pack.run("ControlNeXtApply", model=model, controlnext=controlnext,
                                       image=sampling.picture(seed), strength=1.0 - seed / 2, start_percent=0.0,
                                       end_percent=1.0)
            plain, fast = controlled, controlled.clone()
            set_torch_compile_wrapper(fast, backend=backend, fullgraph=True)
            drawn += [sampling.sample(one, *sampling.conds(one, base), latent_of(base), cfg=3.0, steps=3, seed=seed)
                      for one in (plain, fast)]
        counted = torch._dynamo.utils.counters
        work.note(f"{name} {backend}: graphs for 2 runs of 3 steps", counted["stats"]["unique_graphs"], most=1,
                  breaks=dict(counted["graph_break"]))
        work.note(f"{name} {backend}: compiled beside eager, relative L2", max(apart(drawn[1], drawn[0]),
                                                                              apart(drawn[3], drawn[2])), most=0.02)
