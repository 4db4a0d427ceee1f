"""Whether control draws the same however ComfyUI places weights, computes and streams: a process for each way."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import sampling
import torch
from on_gpu import right
from on_gpu.device import CUDA, allocated
from on_gpu.figures import Work

FAMILIES = ("sd15", "sdxl", "svd", "sd3", "flux", "wan")
SMALL_FAMILIES = ("sd15", "flux")
SETTINGS = dict(strength=1.0, start_percent=0.0, end_percent=1.0)
RUNS = 2  # the second one takes the features that the first has kept on the host


def draw(work: Work, way: str, group: str, most: float) -> None:
    """Pictures of several bases with control and without, beside those of the first way of a group.

    Args:
        most: how far they may be apart, relative L2.
    """
    work.note(f"{way}: weights of a MODEL are placed by", type_of_placement())
    families = right.every_family(work)
    for name in SMALL_FAMILIES if work.small else FAMILIES:
        base, make_model, controlnext = families[name]
        model = make_model(torch.float16 if CUDA else torch.float32)
        bare, runs, off = drawn(work, base, model, controlnext)
        work.note(f"{way} {name}: finite", bool(torch.isfinite(torch.stack([bare, *runs])).all()), wanted=True)
        work.note(f"{way} {name}: a second run draws the same bits", torch.equal(*runs), wanted=True)
        work.note(f"{way} {name}: strength 0 changes no bit", torch.equal(bare, off), wanted=True)
        for what, picture in (("bare", bare), ("controlled", runs[0])):
            found = work.beside_others(f"{group}_{name}_{what}", lambda picture=picture: picture, right.apart)
            if found is not None:
                work.note(f"{way} {name}: {what}, relative L2 to the first way's", found, most=most)
    comfy.model_management.unload_all_models()
    work.note(f"{way}: left on the device", allocated(), unit="MB")


def drawn(work: Work, base: str, model, controlnext) -> tuple:
    """(a latent without control, those of RUNS runs with it, one with control of strength 0)."""
    prompts, latent, image = sampling.conds(model, base), right.latent_of(base), sampling.picture()

    def picture(one) -> torch.Tensor:
        return sampling.sample(one, *prompts, latent, cfg=3.0, steps=4)

    inputs = dict(model=model, controlnext=controlnext, image=image)
    controlled = work.pack.run("ControlNeXtApply", **inputs, **SETTINGS)
    off = work.pack.run("ControlNeXtApply", **inputs, **(SETTINGS | {"strength": 0.0}))
    controlnext.loaded.features.clear()
    return picture(model), [picture(controlled) for _ in range(RUNS)], picture(off)


def type_of_placement() -> str:
    """How ComfyUI manages weights in this process."""
    return f"{comfy.model_patcher.CoreModelPatcher.__name__}, {comfy.model_management.vram_state.name}"
