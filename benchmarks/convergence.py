"""How fast control appears: ControlNeXt, with a zero convolution, from a ControlNet as its teacher; and a ControlNet.

    python benchmarks/convergence.py [cross|zero|controlnet|distilled ...] [--seeds 0 1 2]

All train on the demonstration's base model, on its drawings, for as many steps: edges to drawing. On the way each draws
the held-out drawings, and Canny edges of what it drew are compared with its control (demo_model/agreement.py).
The paper (arXiv 2408.06070) claims that control appears sooner with cross normalization than with a zero convolution.
`distilled` learns what the base predicts under the ControlNet of its seed, which is trained first.
It trains what is not trained to its end yet, from where it was stopped, and writes results/convergence.json and .png
of all seeds of which every kind is.
"""

from __future__ import annotations

import time

import world

STEPS, EVERY = 600, 60
LEARNING_RATE, UNET_LEARNING_RATE = 1e-3, 3e-4
SNR_LIMIT, DROPPED_CAPTIONS, SWAPPED_CAPTIONS = 1.0, 0.3, 0.3  # of demo_model/denoiser.py's loss
DRAWINGS, SAMPLING_STEPS, SEED = 32, 10, 1
SEEDS = (0, 1, 2)
LABELS = {"cross": "ControlNeXt, cross normalization", "zero": "ControlNeXt, zero convolution",
          "controlnet": "ControlNet, copied encoder", "distilled": "ControlNeXt, taught by the ControlNet"}


def new_controlnet(unet):
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


def controlled(kind: str, unet, seed: int):
    """A model ``(x, timestep, caption, control image) -> noise`` and AdamW's parameter groups for it."""
    import torch
    from torch import nn

    from controlnext_core.families import FAMILIES
    from controlnext_core.training import add_features, control_features, new_module, select_weights
    from controlnext_core.unet_keys import diffusers_to_ldm
    from demo_model.control import BASE_SETTINGS, WIDTHS

    class WithControlNeXt(nn.Module):
        def __init__(self, zero: bool):
            super().__init__()
            self.unet, self.zero, self.family = unet.requires_grad_(False), zero, FAMILIES["sd15"]
            self.module = new_module(self.family, seed, zero, **WIDTHS)
            names = diffusers_to_ldm(unet.state_dict())
            trained = select_weights(names, BASE_SETTINGS["sd15"]["unet_pattern"]).values()
            self.trained = [unet.get_parameter(key).requires_grad_(True) for key in trained]

        def forward(self, x, timestep, caption, image):
            features = control_features(self.module, self.family, image, timestep, x.shape[-2:], self.zero)

            def add(h, options: dict):
                return add_features(h, features, zero_convolution=self.zero) if options["block"] == ("input", 0) else h

            return self.unet(x, timesteps=timestep, context=caption,
                             transformer_options={"patches": {"input_block_patch_after_skip": [add]}})

    if kind != "controlnet":
        model = WithControlNeXt(kind == "zero")
        return model, [{"params": list(model.module.parameters()), "lr": LEARNING_RATE},
                       {"params": model.trained, "lr": UNET_LEARNING_RATE}]

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
    groups = [{"params": [value for name, value in model.net.named_parameters() if (name in copied) == copies],
               "lr": UNET_LEARNING_RATE if copies else LEARNING_RATE} for copies in (False, True)]
    return model, groups


def load_base():
    """The base model's (UNet, autoencoder, deviation of its latents) from its file."""
    from safetensors.torch import load_file

    from demo_model import provide
    from demo_model.autoencoder import load_narrow
    from demo_model.bases import BASES
    from demo_model.denoiser import new_unet
    tensors = load_file(provide.source(provide.CHECKPOINT))
    unet, vae = new_unet(), provide.part(tensors, provide.VAE)
    autoencoder, deviation = load_narrow(vae), vae["vae_scale"].item() / BASES["sd15"].scale
    unet.load_state_dict(provide.part(tensors, provide.UNET))
    return unet, autoencoder.eval().requires_grad_(False), deviation


def draw(model, captions, images, autoencoder, deviation: float):
    """Pictures (N, 3, H, W) in [0, 1] of a model that predicts noise: DPM-Solver++ in SAMPLING_STEPS, no guidance."""
    import torch
    from comfy.k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m
    from comfy.model_sampling import ModelSamplingDiscrete

    from demo_model.loop import mixed_precision
    schedule = ModelSamplingDiscrete()
    sigmas = get_sigmas_karras(SAMPLING_STEPS, schedule.sigma_min.item(), schedule.sigma_max.item())
    device = autoencoder.taesd_decoder[1].weight.device

    def denoise(x, sigma):
        scaled = x / (sigma ** 2 + 1).sqrt().view(-1, 1, 1, 1)
        with mixed_precision(device):
            noise = model(scaled, schedule.timestep(sigma).float().to(device), captions, images)
        return x - sigma.view(-1, 1, 1, 1) * noise.float()

    size = images.shape[-1] // 8
    noise = torch.randn(len(images), 4, size, size, generator=torch.Generator().manual_seed(SEED)).to(device)
    with torch.no_grad():
        latents = sample_dpmpp_2m(denoise, noise * sigmas[0], sigmas.to(device), disable=True)
        return autoencoder.taesd_decoder(latents * deviation).clamp(0, 1)


def learn(kind: str, seed: int, folder) -> dict:
    """Train one kind, from where it was stopped; returns its curve of agreement, its parameters, its seconds a step."""
    import json

    import torch

    from demo_model.agreement import drawn_edges, edge_f1
    from demo_model.bases import BASES
    from demo_model.denoiser import denoising_loss
    from demo_model.loop import train
    from demo_model.samples import Samples, as_image, control_maps, encode, load_texts, varied_drawings
    from demo_model.world import load_world, to_drawings

    file = folder / f"convergence_{kind}_{seed}.json"
    result = json.loads(file.read_text()) if file.exists() else {"f1": {}, "seconds": 0.0, "machine": world.machine()}
    if str(STEPS) in result["f1"]:
        return result
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet, autoencoder, deviation = load_base()
    autoencoder = autoencoder.to(device)
    drawn = load_world(folder)

    varied = varied_drawings(drawn)
    latents = encode(varied, autoencoder.taesd_encoder)
    captions, _ = load_texts(drawn, folder, BASES["sd15"])
    samples = Samples(latents / latents.std(), captions, control_maps(varied, drawn_edges), drawn)
    model, rates = controlled(kind, unet, seed)
    model.to(device)
    held_out = drawn.held_out[:DRAWINGS]
    controls = [drawn_edges(drawing) for drawing in drawn.drawings[held_out]]
    images = as_image(torch.stack([torch.from_numpy(control) for control in controls])).to(device)
    captions = samples.captions[held_out].float().to(device)
    since = time.monotonic()

    def watch(step: int, averaged) -> None:
        nonlocal since
        result["seconds"] += time.monotonic() - since
        pictures = to_drawings(draw(averaged, captions, images, autoencoder, deviation))
        found = [edge_f1(drawn_edges(picture), control) for picture, control in zip(pictures, controls, strict=True)]
        result["f1"][str(step)] = sum(found) / len(found)
        print(f"{kind}, seed {seed}: step {step}, F1 {result['f1'][str(step)]:.3f}", flush=True)
        result["parameters"] = sum(value.numel() for group in rates for value in group["params"])
        file.write_text(json.dumps(result), encoding="utf-8")
        since = time.monotonic()

    loss = denoising_loss(model, samples, device, DROPPED_CAPTIONS, SNR_LIMIT, SWAPPED_CAPTIONS,
                          trained_controlnet(seed, folder).to(device) if kind == "distilled" else None)
    train(model, loss, rates, STEPS, file.with_suffix(".pt"), average=0.98, save_every=EVERY, watch=watch, seed=seed)
    return result


def trained_controlnet(seed: int, folder):
    """The ControlNet on its base, trained to the end."""
    import torch
    from torch.optim.swa_utils import AveragedModel
    learn("controlnet", seed, folder)
    averaged = AveragedModel(controlled("controlnet", load_base()[0], seed)[0])
    averaged.load_state_dict(torch.load(folder / f"convergence_controlnet_{seed}.pt", weights_only=True)["averaged"])
    return averaged.module.requires_grad_(False).eval()


def plot(curves: dict[str, dict[str, tuple[float, float]]], seeds: int, path) -> None:
    """Curves {step: (mean, spread)} of agreement as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for kind, curve in curves.items():
        means, spreads = zip(*curve.values(), strict=True)
        axes.errorbar([int(step) for step in curve], means, spreads, label=LABELS[kind], marker=".", capsize=2)
    axes.set(xlabel="training steps", ylabel=f"F1 of edges, {DRAWINGS} held-out drawings, {seeds} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    import argparse
    from statistics import mean, pstdev
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"train these of {', '.join(LABELS)}; then no report")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(LABELS):
        parser.error(f"{min(unknown)} is none of {', '.join(LABELS)}")
    world.enter()
    folder = world.environment.cache_folder() / "demo_model"
    results = {kind: {} for kind in options.kinds or LABELS}
    for seed in options.seeds:
        for kind in results:
            results[kind][seed] = learn(kind, seed, folder)
    if options.kinds:
        return
    curves = {kind: {step: (mean(values), pstdev(values)) for step in found[options.seeds[0]]["f1"]
                     for values in [[result["f1"][step] for result in found.values()]]}
              for kind, found in results.items()}
    rows = [[LABELS[kind], f"{found[options.seeds[0]]['parameters'] / 1e6:.2f} million",
             f"{mean(result['seconds'] for result in found.values()) / STEPS:.2f}",
             *(f"{middle:.3f} +-{spread:.3f}" for middle, spread in curves[kind].values())]
            for kind, found in results.items()]
    world.report("convergence", f"F1 of edges of {DRAWINGS} held-out drawings over training steps, "
                                f"{len(options.seeds)} seeds", ["", "trained parameters", "seconds a step",
                                                                *curves["cross"]], rows, {"results": results})
    plot(curves, len(options.seeds), world.FOLDER / "results" / "convergence.png")


if __name__ == "__main__":
    main()
