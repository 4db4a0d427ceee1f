"""Whether control gives back what it takes, and survives a device that is full."""

from __future__ import annotations

import contextlib

import sampling
import torch
from on_gpu import right
from on_gpu.device import CUDA, allocated
from on_gpu.figures import Work

RUNS = 20
FAMILIES = ("sd15", "svd", "flux", "wan")
SMALL_FAMILIES = ("sd15",)
SETTINGS = dict(strength=1.0, start_percent=0.0, end_percent=1.0)
IMAGES, SIDE = 6, 768  # the last image's part finds the device full, of the others' among other things
BLOCKS = (2 ** 28, 2 ** 24, 2 ** 20)  # bytes of what fills the device, ever smaller


def twenty_runs(work: Work) -> None:
    """Device memory after each of many runs, by either route, each with a picture of its own."""
    families = right.every_family(work)
    for name in SMALL_FAMILIES if work.small else FAMILIES:
        base, make_model, controlnext = families[name]
        model = make_model(torch.float16 if CUDA else torch.float32)
        for route in right.ROUTES:
            after = [after_run(work, base, model, controlnext, route, seed) for seed in range(RUNS if CUDA else 2)]
            work.note(f"{name} by {route}: device memory after {len(after)} runs, above that after the second",
                      after[-1] - after[1], unit="MB", most=0, after=after,
                      reserved=torch.cuda.max_memory_reserved() if CUDA else None)


def after_run(work: Work, base: str, model, controlnext, route: str, seed: int) -> int:
    """Bytes on the device after a run."""
    prompts, image = sampling.conds(model, base), sampling.picture(seed)
    if route == right.ROUTES[0]:
        model = work.pack.run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, **SETTINGS)
    else:
        net = work.pack.run("ControlNeXtToControlNet", controlnext=controlnext)
        prompts = work.pack.run("ControlNetApplyAdvanced", positive=prompts[0], negative=prompts[1], control_net=net,
                                image=image, **SETTINGS)
    sampling.sample(model, *prompts, right.latent_of(base), cfg=3.0, steps=2)
    del model, prompts
    return allocated()


def brim(work: Work) -> None:
    """Memory runs out inside the module, on a device that is filled to the brim; the run goes on all the same.

    Needs a CONTROLNEXT_CACHE_MB with which all image parts stay on the device, for they are what is given up.
    """
    families, side = right.every_family(work), 64 if work.small else SIDE
    base, make_model, controlnext = families["sd15"]
    model = make_model(torch.float16 if CUDA else torch.float32)
    image = sampling.picture(0, IMAGES, side, side)
    controlled = work.pack.run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, **SETTINGS)
    latent = torch.zeros(IMAGES, *sampling.LATENTS[base], side // 8, side // 8)

    def picture() -> torch.Tensor:
        controlnext.loaded.features.clear()
        return sampling.sample(controlled, *sampling.conds(model, base), latent, cfg=1.0, steps=1)

    expected, before = picture(), allocated()
    with full_device(controlnext.loaded.patcher.model, IMAGES) as met:
        found = picture()
    work.note("out-of-memory errors that the module met", len(met["errors"]), errors=met["errors"])
    work.note("memory ran out once, for real" if CUDA else "memory ran out once, as if", len(met["errors"]) == 1,
              wanted=True, filled=met["filled"])
    work.note("the picture of the run that went on, relative L2", right.apart(found, expected), most=1e-3)
    work.note("device memory afterwards, above that before", allocated() - before, unit="MB", most=0)


@contextlib.contextmanager
def full_device(module: torch.nn.Module, at: int):
    """Fill the device when a module begins its ``at``-th image's part, until it has made it in a second try.

    Gives {errors: those that the module met, filled: bytes}. A CPU has no brim: there the error is raised as CUDA's.
    """
    met, filling, calls = {"errors": [], "filled": 0}, [], []
    image_part = module.image_part

    def part(*args):
        calls.append(1)
        if len(calls) == at:
            fill_to_the_brim(filling)
            met["filled"] = sum(block.nbytes for block in filling)
        try:
            if len(calls) == at and not CUDA:
                raise torch.OutOfMemoryError("CUDA out of memory, as if")
            return image_part(*args)
        except torch.OutOfMemoryError as error:
            met["errors"].append(str(error).splitlines()[0])
            raise
        finally:
            if len(calls) > at:
                filling.clear()

    module.image_part = part
    try:
        yield met
    finally:
        del module.image_part
        filling.clear()


def fill_to_the_brim(filling: list[torch.Tensor]) -> None:
    """Take all memory of the device that is left, in ever smaller blocks."""
    if not CUDA:
        return
    torch.cuda.empty_cache()
    for size in BLOCKS:
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                filling.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
