"""What control costs in a step of the released sizes: this pack, the reference's way and ComfyUI's own ControlNet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import comfy.cldm.cldm
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.latent_formats
import comfy.ldm.flux.controlnet
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import models
import torch
import torch.nn.functional as F
import ways
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from on_gpu import bases
from on_gpu.device import CUDA, DEVICE, Watch, clocks, mark, profiled, seconds, wait
from on_gpu.figures import Work

from controlnext_core.families import FAMILIES
from controlnext_core.sizes import halved

ALONE, FIRST, SECOND, REFERENCE, NATIVE = ("denoiser alone", "first run", "second run", "reference's way",
                                           "ComfyUI's ControlNet")
GOALS = {FIRST: 0.015, SECOND: 0.005}  # control's own time, as a share of a step
OF_REFERENCE = 0.25
WARM, TIMED = 5, 20  # steps
PROFILED = 3


class Bench:
    """A Case and all ways to control it: {way: (MODEL, (positive, negative))}; what control does is under the watch."""

    def __init__(self, work: Work, case: bases.Case, compiled: bool = False):
        self.work, self.case, self.compiled, self.watch = work, case, compiled, Watch()
        self.steps = 2 if work.small else TIMED
        if compiled:
            set_torch_compile_wrapper(case.model, backend="inductor" if CUDA else "eager")
        wrappers = case.model.wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
        case.model.wrappers[WrappersMP.APPLY_MODEL] = {"outside": [self.watch.outside], **wrappers}  # the outermost
        self.ways = self.make_ways()
        self.watch_ways()

    def make_ways(self) -> dict[str, tuple]:
        case, pack = self.case, self.work.pack
        controlled = pack.run("ControlNeXtApply", model=case.model, controlnext=case.controlnext, image=case.image,
                              strength=1.0, start_percent=0.0, end_percent=1.0)
        found = {ALONE: (case.model, case.conds), FIRST: (controlled, case.conds), SECOND: (controlled, case.conds)}
        if case.released.base in models.UNETS:  # the reference has no transformers
            found[REFERENCE] = ways.with_reference_control(pack, case.model, controlled), case.conds
        if case.released.base in NATIVES:
            vae = ReadyLatent(torch.randn(case.latent.shape, generator=torch.Generator().manual_seed(3)))
            found[NATIVE] = case.model, ways.with_native_control(case.conds, native_controlnet(case), case.image, vae)
        return found

    def watch_ways(self) -> None:
        for model in dict.fromkeys(model for model, _ in self.ways.values()):
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "inside", self.watch.inside)
        native = comfy.controlnet.ControlNet
        native.get_control = self.watch.watched(native.get_control)
        if not self.compiled:  # a watch inside the compiled denoiser would cut its graph in pieces
            injection = self.work.pack.module("nodes.runtime.injection")
            injection.waiting_at = self.watch.watched(injection.waiting_at)
            for name in ("add_controls", "add_to_tokens"):
                setattr(injection, name, self.watch.watched(getattr(injection, name)))
            ways.ReferenceControl.__call__ = self.watch.watched(ways.ReferenceControl.__call__)

    def sample(self, way: str, steps: int | None = None) -> list[tuple[float, float]]:
        """(seconds, those of control) of the first steps of a sampling, of all of them if not said."""
        case, (model, (positive, negative)) = self.case, self.ways[way]
        if way == FIRST:
            case.controlnext.loaded.features.clear()
        sampling = case.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", self.steps)[:(steps or self.steps) + 1]

        def sampler(apply, x, sigmas, extra_args=None, **_):
            for sigma in sigmas[:-1]:
                self.output = self.watch.step(lambda at=sigma: apply(x, at.expand(len(x)), **extra_args))
            return x

        noise = torch.randn(case.latent.shape, generator=torch.Generator().manual_seed(4))
        with torch.inference_mode():
            comfy.sample.sample_custom(model, noise, cfg=case.released.cfg, sampler=comfy.samplers.KSAMPLER(sampler),
                                       sigmas=sigmas, positive=positive, negative=negative, latent_image=case.latent,
                                       disable_pbar=True, seed=1)
        return self.watch.read()


def a_step(found: list[float]) -> float:
    """One figure for a step of a whole sampling: the surplus of its first step is spread over all."""
    first, *later = found
    return (first + len(later) * statistics.median(later)) / len(found)


class ReadyLatent:
    """Stands where a ControlNet asks a VAE for its image's latent, so that no VAE's time is among the ControlNet's."""

    def __init__(self, latent: torch.Tensor):
        self.latent = latent

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.latent


def native_controlnet(case: bases.Case) -> comfy.controlnet.ControlNet:
    """ComfyUI's own ControlNet for a Case whose base is in NATIVES, with random weights."""
    make_net, latent_format = NATIVES[case.released.base]
    net = make_net(case.model.model, dict(dtype=case.dtype, device="meta", operations=comfy.ops.manual_cast))
    bases.fill(net)
    settings = {} if latent_format is None else {"compression_ratio": 1, "latent_format": latent_format(),
                                                 "extra_conds": ["y", "guidance"]}
    return comfy.controlnet.ControlNet(net, load_device=DEVICE, manual_cast_dtype=case.dtype, **settings)


def _unet_net(base_model, settings: dict):
    return ways.native_net(base_model, settings["dtype"], settings["device"])


def _sd3_net(base_model, settings: dict):
    """Of 6 blocks, as those of SD3 medium are published."""
    config = {key: value for key, value in base_model.model_config.unet_config.items()
              if key not in ("dtype", "out_channels")}
    return comfy.cldm.mmdit.ControlNet(num_blocks=min(6, config["depth"]), control_latent_channels=16, **settings,
                                       **config)


def _flux_net(base_model, settings: dict):
    """Of 5 double and 10 single blocks."""
    config = {key: value for key, value in base_model.model_config.unet_config.items() if key != "dtype"}
    config |= dict(depth=min(5, config["depth"]), depth_single_blocks=min(10, config["depth_single_blocks"]))
    return comfy.ldm.flux.controlnet.ControlNetFlux(latent_input=True, control_latent_channels=16, **settings, **config)


# {base: (network of ComfyUI's ControlNet, format of the latents that it takes for its image, None where it takes the
# image)}; ComfyUI has none for SVD, and for Wan it has a model with control instead
NATIVES = {"sd15": (_unet_net, None), "sdxl": (_unet_net, None), "sd3": (_sd3_net, comfy.latent_formats.SD3),
           "flux": (_flux_net, comfy.latent_formats.Flux)}


def steps(work: Work, name: str, compiled: bool = False) -> None:
    """The time of a step of each way, and control's own in it; where that is too much, what it goes into."""
    started = time.perf_counter()
    bench = Bench(work, bases.make(work, name), compiled)
    wait()
    work.note(f"made in{', compiled' if compiled else ''}", time.perf_counter() - started, unit="s", clocks=clocks())
    measured = {way: measure(work, bench, way) for way in bench.ways}

    alone, too_much = measured[ALONE][0], []
    for way in (way for way in measured if way != ALONE):
        own, above = measured[way][1] / alone, measured[way][0] / alone - 1
        goal, judged = GOALS.get(way), above if compiled else own  # a compiled denoiser has a part of control inside
        work.note(f"{way}: control's own time, of a step", own, unit="%", most=None if compiled else goal,
                  brief="" if compiled else way)
        work.note(f"{way}: whole step above the denoiser's", above, unit="%", most=goal if compiled else None,
                  brief=way if compiled else "")
        too_much += [way] if goal is not None and judged > goal else []

    reference = measured[REFERENCE][1] if REFERENCE in measured else reference_apart(work, bench)
    work.note("first run: control's own time, of the reference's way", measured[FIRST][1] / reference,
              most=None if compiled else OF_REFERENCE, brief="of the reference's", reference=reference,
              apart=REFERENCE not in measured)
    if too_much and not (work.small and compiled):
        work.note(f"profile of {PROFILED} steps", "written", **{way: profile_of(bench, way)
                                                               for way in (ALONE, *too_much)})


def measure(work: Work, bench: Bench, way: str) -> tuple[float, float]:
    """(seconds, those of control) of a step of a way, written down with what it took."""
    started = time.perf_counter()
    bench.sample(way, min(WARM, bench.steps))
    warm = time.perf_counter() - started
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    whole, own = zip(*bench.sample(way), strict=True)
    step = a_step(whole)
    work.note(f"{way}: a step", step, unit="ms", brief=way if way == ALONE else "", control=a_step(own),
              steps=whole, control_of_steps=own,
              warmed_up_in=warm, clocks=clocks(), finite=bool(torch.isfinite(bench.output).all()),
              peak=torch.cuda.max_memory_allocated() if CUDA else None,
              kept=len(bench.case.controlnext.loaded.features.kept()))
    return step, a_step(own)


def profile_of(bench: Bench, way: str) -> dict:
    """What runs on the device in some steps of a way."""
    return profiled(lambda: bench.sample(way, min(PROFILED, bench.steps)))


def reference_apart(work: Work, bench: Bench) -> float:
    """Seconds of the reference's way in a step of a transformer, for which it has none: computed beside the sampling.

    The module anew in each half, its features pooled, normalized to the tokens' statistics and added to them.
    """
    case = bench.case
    module, family = case.controlnext.patcher.model, FAMILIES[case.released.base]
    place = work.pack.module("nodes.runtime.places").places_of(case.model.model.diffusion_model)[family.place_name]
    halves, images = case.released.halves, len(case.image)
    frames = case.latent.shape[2] if case.latent.ndim == 5 else 1
    grid = (frames, *halved(tuple(case.latent.shape[-2:]), place.halvings))
    shown = case.image.movedim(-1, 1).to(DEVICE, case.dtype).repeat(halves, 1, 1, 1)
    timesteps = torch.full((1,), 500.0, device=DEVICE)
    tokens = torch.randn(halves, place.channels, *grid, device=DEVICE, dtype=case.dtype)

    def way() -> torch.Tensor:
        features = module(shown, timesteps, family.stem_padding, family.stem_pool)
        features = F.adaptive_avg_pool3d(features.unflatten(0, (halves, images)).transpose(1, 2), grid)
        every = {"dim": (1, 2, 3, 4), "keepdim": True}
        return tokens + ((features - features.mean(**every)) * tokens.std(**every) / features.std(**every)
                         + tokens.mean(**every))

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([case.controlnext.patcher])
        return median_of(way, 1 if work.small else WARM, bench.steps)


def median_of(function: Callable, warm: int, timed: int) -> float:
    """Median seconds of a call on the device."""
    found = []
    for _ in range(warm + timed):
        start = mark()
        function()
        found.append((start, mark()))
    wait()
    return statistics.median(seconds(*pair) for pair in found[warm:])
