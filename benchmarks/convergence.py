"""How fast control appears: ControlNeXt, with a zero convolution, from a ControlNet as its teacher; and a ControlNet.

    python benchmarks/convergence.py [KIND ...] [--seeds 0 1 2]
    python benchmarks/convergence.py --write-teacher FILE

All train on the demonstration's base model, on its drawings, for as many steps: edges to drawing. On the way each draws
the held-out drawings, and Canny edges of what it drew are compared with its control (demo_model/agreement.py).
The paper (arXiv 2408.06070) claims that control appears sooner with cross normalization than with a zero convolution.
A taught one learns what the base predicts under the ControlNet of its seed, which is trained first.
It trains all that is not trained to its end yet, from where it was stopped: KINDS of each seed and, of the first,
VARIATIONS that explain them; or only those named. Without names it writes results/convergence.json and .png.
The second command trains only the first seed's ControlNet and writes it as ComfyUI's loader takes it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import harness

if TYPE_CHECKING:
    import numpy as np
    import torch
    from comfy.cldm.cldm import ControlNet
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from torch import nn

    from demo_model.autoencoder import Autoencoder
    from demo_model.samples import Samples

STEPS, EVERY = 600, 60
LEARNING_RATE, UNET_LEARNING_RATE = 1e-3, 3e-4
SNR_LIMIT, DROPPED_CAPTIONS, SWAPPED_CAPTIONS = 1.0, 0.3, 0.3  # settings of demo_model/denoiser.py's loss
DRAWINGS, SAMPLING_STEPS, SEED = 32, 10, 1
ROUNDS = 7  # in which each kind's step is timed
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Kind:
    """A kind of control, and its training.

    Attributes:
        label: its name in the table and the picture.
        net: cross or zero of ControlNeXt, or controlnet.
        rate, unet_rate: times the learning rates.
        scale_rate: times the module's learning rate, for the scale that control is multiplied by; 0: it stays 1.
        pattern: in the names, diffusers', of the UNet weights that are trained along; None for the demonstration's own.
        taught: a ControlNet's predictions are to be met, not the noise.
        matched: so are the features that the UNet's decoder gets, skip connections and all, where a ControlNet adds.
    """

    label: str
    net: str
    rate: float = 1.0
    unet_rate: float = 1.0
    scale_rate: float = 0.0
    pattern: str | None = None
    taught: bool = False
    matched: bool = False


KINDS = {
    "cross": Kind("ControlNeXt, cross normalization", "cross"),
    "zero": Kind("ControlNeXt, zero convolution", "zero"),
    "controlnet": Kind("ControlNet, copied encoder", "controlnet"),
    "distilled": Kind("ControlNeXt, taught by the ControlNet", "cross", taught=True),
    "cross_scale": Kind("cross normalization, scale learned", "cross", scale_rate=10),
    "distilled_scale": Kind("taught, scale learned", "cross", taught=True, scale_rate=10),
    "cross_scale_unet_rate": Kind("cross normalization, scale learned, UNet's rate x 3", "cross", unet_rate=3,
                                  scale_rate=10),
    "distilled_scale_unet_rate": Kind("taught, scale learned, UNet's rate x 3", "cross", taught=True, unet_rate=3,
                                      scale_rate=10),
    "cross_encoder": Kind("cross normalization, and the encoder's convolutions", "cross", unet_rate=3,
                          scale_rate=10, pattern="to_out|down_blocks.*conv"),
    "distilled_encoder": Kind("taught, and the encoder's convolutions", "cross", taught=True, unet_rate=3,
                              scale_rate=10, pattern="to_out|down_blocks.*conv"),
    "cross_unet": Kind("cross normalization, the whole UNet trained", "cross", pattern=""),
    "distilled_unet": Kind("taught, the whole UNet trained", "cross", taught=True, pattern=""),
}
# kinds that explain where those end, on the first seed
VARIATIONS = {
    "cross_scale_slow": Kind("cross normalization, scale learned at the module's rate", "cross", scale_rate=1),
    "cross_module_rate": Kind("cross normalization, module's rate x 3", "cross", rate=3),
    "cross_unet_rate": Kind("cross normalization, UNet's rate x 3", "cross", unet_rate=3),
    "zero_unet_rate": Kind("zero convolution, UNet's rate x 3", "zero", unet_rate=3),
    "distilled_matched": Kind("taught, and its features matched", "cross", taught=True, matched=True),
}
ALL = KINDS | VARIATIONS


def new_controlnet(unet: UNetModel) -> ControlNet:
    """ComfyUI's ControlNet with the encoder of `unet` copied; without a middle block, as this UNet has none."""
    import torch
    from comfy.cldm.cldm import ControlNet
    from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential

    from demo_model.denoiser import UNET
    from demo_model.loop import initialise
    net = ControlNet(**UNET, hint_channels=3, dtype=torch.float32)
    net.middle_block = TimestepEmbedSequential()
    initialise(net)
    net.load_state_dict(unet.state_dict(), strict=False)
    for zero in (*net.zero_convs, net.middle_block_out, net.input_hint_block[-1]):
        for parameter in zero.parameters():
            torch.nn.init.zeros_(parameter)
    return net


def controlled(kind: Kind, unet: UNetModel, seed: int) -> tuple[nn.Module, list[dict]]:
    """A model ``(x, timestep, caption, control image) -> noise`` and AdamW's parameter groups for it."""
    return with_controlnet(unet, seed) if kind.net == "controlnet" else with_controlnext(kind, unet, seed)


def with_controlnext(kind: Kind, unet: UNetModel, seed: int) -> tuple[nn.Module, list[dict]]:
    from torch import nn

    from controlnext_core.families import FAMILIES
    from controlnext_core.features import add_features, control_features
    from controlnext_core.module import new_module
    from controlnext_core.training import select_weights
    from controlnext_core.unet_keys import diffusers_to_ldm
    from demo_model.control import BASE_SETTINGS, WIDTHS

    class WithControlNeXt(nn.Module):
        def __init__(self, zero: bool):
            super().__init__()
            self.unet, self.zero, self.family = unet.requires_grad_(False), zero, FAMILIES["sd15"]
            self.module = new_module(self.family, seed, zero, scale=1.0, **WIDTHS)
            self.module.scale.requires_grad_(kind.scale_rate > 0)

            names = diffusers_to_ldm(unet.state_dict())
            pattern = BASE_SETTINGS["sd15"]["unet_pattern"] if kind.pattern is None else kind.pattern
            trained = select_weights(names, pattern).values()
            self.trained = [unet.get_parameter(key).requires_grad_(True) for key in trained]

        def forward(self, x, timestep, caption, image):
            parts = [self.module.image_part(image, self.family.stem_padding, self.family.stem_pool)]
            features = control_features(self.module, self.family, parts, timestep, x.shape[-2:], self.zero)

            def add(h, options: dict):
                if options["block"] != ("input", 0):
                    return h
                return add_features(h, features, self.module.scale, self.zero)

            return self.unet(x, timesteps=timestep, context=caption,
                             transformer_options={"patches": {"input_block_patch_after_skip": [add]}})

    model = WithControlNeXt(kind.net == "zero")
    layers = [value for name, value in model.module.named_parameters() if name != "scale"]
    return model, [{"params": [model.module.scale], "lr": kind.scale_rate * LEARNING_RATE},
                   {"params": layers, "lr": kind.rate * LEARNING_RATE},
                   {"params": model.trained, "lr": kind.unet_rate * UNET_LEARNING_RATE}]


def with_controlnet(unet: UNetModel, seed: int) -> tuple[nn.Module, list[dict]]:
    import torch
    from torch import nn

    class WithControlNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.net = unet.requires_grad_(False), new_controlnet(unet)

        def forward(self, x, timestep, caption, image):
            control = self.net(x, image, timestep, caption)
            return self.unet(x, timesteps=timestep, context=caption, control=control)

    torch.manual_seed(seed)
    model = WithControlNet()
    copied = {name for name, _ in unet.named_parameters()}
    new = [value for name, value in model.net.named_parameters() if name not in copied]
    copies = [value for name, value in model.net.named_parameters() if name in copied]
    return model, [{"params": new, "lr": LEARNING_RATE}, {"params": copies, "lr": UNET_LEARNING_RATE}]


@dataclass(frozen=True)
class Data:
    """The samples to train on, and the held-out drawings whose controls show how far control has come.

    Attributes:
        controls: edges of the held-out drawings, (H, W) bool each; ``images`` and ``captions`` go with them.
        autoencoder, std: from ``load_autoencoder``.
    """

    samples: Samples
    controls: list[np.ndarray]
    images: torch.Tensor
    captions: torch.Tensor
    autoencoder: Autoencoder
    std: float
    device: torch.device


def load_unet() -> UNetModel:
    """The base model's UNet from its file, each time anew."""
    from safetensors.torch import load_file

    from demo_model import provide
    from demo_model.bases import BASES
    from demo_model.denoiser import new_unet
    unet = new_unet()
    unet.load_state_dict(provide.part(load_file(provide.source(BASES["sd15"].checkpoint)), provide.UNET))
    return unet


def load_autoencoder() -> tuple[Autoencoder, float]:
    """(the base model's autoencoder, the std of its latents) from its file."""
    from safetensors.torch import load_file

    from demo_model import provide
    from demo_model.autoencoder import load_narrow
    from demo_model.bases import BASES
    base = BASES["sd15"]
    vae = provide.part(load_file(provide.source(base.checkpoint)), provide.VAE)
    return load_narrow(vae).eval().requires_grad_(False), vae["vae_scale"].item() / base.scale


def draw(model: nn.Module, data: Data) -> torch.Tensor:
    """Pictures (N, 3, H, W) in [0, 1] of a model that predicts noise: DPM-Solver++ in SAMPLING_STEPS, no guidance."""
    import torch
    from comfy.k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m
    from comfy.model_sampling import ModelSamplingDiscrete

    from demo_model.loop import mixed_precision
    schedule = ModelSamplingDiscrete()
    sigmas = get_sigmas_karras(SAMPLING_STEPS, schedule.sigma_min.item(), schedule.sigma_max.item())

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        scaled = x / (sigma ** 2 + 1).sqrt().view(-1, 1, 1, 1)
        with mixed_precision(data.device):
            noise = model(scaled, schedule.timestep(sigma).float().to(data.device), data.captions, data.images)
        return x - sigma.view(-1, 1, 1, 1) * noise.float()

    count, _, height, width = data.images.shape
    noise = torch.randn(count, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        latents = sample_dpmpp_2m(denoise, noise.to(data.device) * sigmas[0], sigmas.to(data.device), disable=True)
        return data.autoencoder.taesd_decoder(latents * data.std).clamp(0, 1)


@cache
def load_data(folder: Path) -> Data:
    """Read and encode the drawings; the first call fetches them."""
    import torch

    from demo_model.agreement import drawn_edges
    from demo_model.bases import BASES
    from demo_model.drawings import load_drawings
    from demo_model.samples import Samples, Varied, as_image, control_maps, encode, load_texts
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder, std = load_autoencoder()
    drawn, autoencoder = load_drawings(folder), autoencoder.to(device)
    varied = Varied(drawn, BASES["sd15"].variations, device)
    latents = encode(varied, autoencoder.taesd_encoder)
    captions, _ = load_texts(drawn, folder, BASES["sd15"])
    samples = Samples(latents / latents.std(), captions, control_maps(varied, drawn_edges), drawn)

    held_out = drawn.held_out[:DRAWINGS]
    controls = [drawn_edges(drawing) for drawing in drawn.pictures[held_out]]
    images = as_image(torch.stack([torch.from_numpy(control) for control in controls]))
    return Data(samples=samples, controls=controls, images=images.to(device),
                captions=captions[held_out].float().to(device), autoencoder=autoencoder, std=std, device=device)


def agreement(model: nn.Module, data: Data) -> float:
    """F1 of the edges of what a model draws with the held-out drawings' own, the mean of all."""
    from statistics import fmean

    from demo_model.agreement import drawn_edges, edge_f1
    from demo_model.drawings import to_drawings
    pictures = to_drawings(draw(model, data))
    return fmean(edge_f1(drawn_edges(picture), control)
                 for picture, control in zip(pictures, data.controls, strict=True))


def prepare(kind: Kind, seed: int, folder: Path) -> tuple[nn.Module, Callable, list[dict]]:
    """(model, loss of a batch, AdamW's parameter groups)."""
    from demo_model.bases import BASES
    from demo_model.denoiser import denoising_loss
    data = load_data(folder)
    model, rates = controlled(kind, load_unet(), seed)
    model.to(data.device)
    teacher = trained_controlnet(seed, folder).to(data.device) if kind.taught else None
    loss = denoising_loss(model, data.samples, BASES["sd15"].batches["denoiser"], dropped=DROPPED_CAPTIONS,
                          snr_limit=SNR_LIMIT, swapped=SWAPPED_CAPTIONS, teacher=teacher)
    return model, with_features(loss, model.unet, teacher.unet) if kind.matched else loss, rates


def learn(kind: str, seed: int, folder: Path) -> dict:
    """Train one kind, from where it was stopped; returns its curve of agreement and its parameters."""
    import json

    from demo_model.loop import train
    file = folder / f"convergence_{kind}_{seed}.json"
    result = json.loads(file.read_text()) if file.exists() else {"f1": {}, "machine": harness.machine()}
    if str(STEPS) in result["f1"]:
        return result
    model, loss, rates = prepare(ALL[kind], seed, folder)
    result["parameters"] = sum(value.numel() for group in rates for value in group["params"] if value.requires_grad)

    def watch(step: int, averaged: nn.Module) -> None:
        result["f1"][str(step)] = agreement(averaged, load_data(folder))
        print(f"{kind}, seed {seed}: step {step}, F1 {result['f1'][str(step)]:.3f}", flush=True)
        file.write_text(json.dumps(result), encoding="utf-8")

    train(model, loss, rates, STEPS, file.with_suffix(".pt"), average=0.98, save_every=EVERY, watch=watch, seed=seed)
    return result


def seconds_a_step(kinds: list[str], folder: Path) -> dict[str, float]:
    """The median of ROUNDS steps of each kind, of all in turn, so that what else the machine does slows all alike."""
    from statistics import median

    import torch

    def stepper(kind: str) -> Callable[[int], None]:
        _, loss, rates = prepare(ALL[kind], SEEDS[0], folder)
        optimizer = torch.optim.AdamW(rates)

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss(torch.Generator().manual_seed(number)).backward()
            optimizer.step()
        return step

    def timed(step: Callable[[int], None], number: int) -> float:
        start = time.monotonic()
        step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic() - start

    steppers, taken = {kind: stepper(kind) for kind in kinds}, {kind: [] for kind in kinds}
    for number in range(ROUNDS + 1):
        for kind, step in steppers.items():
            taken[kind].append(timed(step, number))
    return {kind: median(seconds[1:]) for kind, seconds in taken.items()}  # the first one warms up


def with_features(loss: Callable, unet: UNetModel, teacher: UNetModel) -> Callable:
    """``loss``, and how far off the teacher's the features are that the decoder's blocks get, by their variance."""
    def watch(unet: UNetModel) -> list:
        seen = [None] * len(unet.output_blocks)
        for i, block in enumerate(unet.output_blocks):
            block[0].register_forward_pre_hook(lambda _, given, i=i: seen.__setitem__(i, given[0].float()))
        return seen

    own, wanted = watch(unet), watch(teacher)

    def loss_of_batch(generator: torch.Generator) -> torch.Tensor:
        value = loss(generator)
        return value + sum((a - b).square().mean() / b.var() for a, b in zip(own, wanted, strict=True)) / len(own)
    return loss_of_batch


def trained_controlnet(seed: int, folder: Path) -> nn.Module:
    """The ControlNet on its base, trained to the end."""
    import torch
    from torch.optim.swa_utils import AveragedModel
    learn("controlnet", seed, folder)
    averaged = AveragedModel(controlled(KINDS["controlnet"], load_unet(), seed)[0])
    averaged.load_state_dict(torch.load(folder / f"convergence_controlnet_{seed}.pt", weights_only=True)["averaged"])
    return averaged.module.requires_grad_(False).eval()


def write_teacher(seed: int, folder: Path, file: str) -> None:
    """Write the trained ControlNet for ComfyUI's loader, which wants a middle block, too: zeros, which add nothing."""
    import torch
    from comfy.cldm.cldm import ControlNet
    from safetensors.torch import save_file

    from demo_model.denoiser import UNET
    loaded = ControlNet(**UNET, hint_channels=3, dtype=torch.float32).state_dict()
    middle = {name: torch.zeros_like(value) for name, value in loaded.items() if name.startswith("middle_block")}
    tensors = middle | trained_controlnet(seed, folder).net.state_dict()
    save_file({name: value.half().contiguous() for name, value in tensors.items()}, file)


def plot(curves: dict[str, dict[str, tuple[float, float]]], seeds: int, path: Path) -> None:
    """Curves {step: (mean, spread)} of agreement as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    axes.set_prop_cycle(color=pyplot.cm.tab20.colors)
    for kind, curve in curves.items():
        means, spreads = zip(*curve.values(), strict=True)
        axes.errorbar([int(step) for step in curve], means, spreads, label=KINDS[kind].label, marker=".", capsize=2,
                      linestyle="--" if KINDS[kind].taught else "-")
    axes.set(xlabel="training steps", ylabel=f"F1 of edges, {DRAWINGS} held-out drawings, {seeds} seeds")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def curve_of(results: list[dict]) -> dict[str, tuple[float, float]]:
    """{step: (mean, spread)} over the seeds."""
    from statistics import mean, pstdev
    def found(step: str) -> list[float]:
        return [result["f1"][step] for result in results]

    return {step: (mean(found(step)), pstdev(found(step))) for step in results[0]["f1"]}


def row(kind: Kind, results: list[dict], taken: float, seconds: float) -> list[str]:
    """A row of the table.

    Args:
        taken: seconds a step.
        seconds: a time for which agreement is told, too, on a line between the steps' figures.
    """
    import numpy as np
    curve = curve_of(results)
    then = np.interp(seconds / taken, [int(step) for step in curve], [middle for middle, _ in curve.values()])
    return [kind.label, f"{results[0]['parameters'] / 1e6:.2f} million", f"{taken:.2f}", f"{then:.3f}",
            *(f"{middle:.3f}" + (f" ± {spread:.3f}" if len(results) > 1 else "") for middle, spread in curve.values())]


def report(results: dict[str, list[dict]], taken: dict[str, float], seeds: int) -> None:
    """Write the table and the picture of all curves."""
    seconds = STEPS * taken["cross"]
    header = ["", "trained parameters", "seconds a step", f"after {seconds:.0f} s", *results["cross"][0]["f1"]]
    harness.report("convergence", f"F1 of edges of {DRAWINGS} held-out drawings over training steps, {seeds} seeds "
                   "(one of kinds that explain)", header,
                   [row(ALL[kind], found, taken[kind], seconds) for kind, found in results.items()],
                   {"seconds_a_step": taken, "results": results})
    plot({kind: curve_of(results[kind]) for kind in KINDS}, seeds, harness.FOLDER / "results" / "convergence.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND",
                        help=f"train only these, some of {', '.join(ALL)}; no report")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="kinds that explain take only the first")
    parser.add_argument("--write-teacher", metavar="FILE", help="the first seed's ControlNet, as a file for ComfyUI")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(ALL):
        parser.error(f"{min(unknown)} is none of {', '.join(ALL)}")
    return options


def main() -> None:
    options = parse_arguments()
    harness.enter()
    folder, (first, *others) = harness.environment.cache_folder() / "demo_model", options.seeds
    if options.write_teacher:
        return write_teacher(first, folder, options.write_teacher)

    results = {}
    for kind in options.kinds or ALL:
        seeds = [first, *others] if kind in KINDS else [first]
        results[kind] = [learn(kind, seed, folder) for seed in seeds]
    if not options.kinds:
        report(results, seconds_a_step(list(ALL), folder), len(options.seeds))


if __name__ == "__main__":
    main()
