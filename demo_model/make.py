"""Makes the demonstration's weights: VAE, UNet, and ControlNeXt for Canny and for mask, trained on drawings.

    python demo_model/make.py

Sets up ComfyUI and its Python environment on the first call, as the demo does, fetches the drawings with npm, and
trains one after the other; stopped and called again, it goes on where it was. The controls are trained by Train
ControlNeXt, on the finished checkpoint. A GPU takes minutes, a CPU many hours.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path += [str(REPOSITORY / "scripts"), str(REPOSITORY)]  # last, since ComfyUI has a module `nodes` of its own

import environment  # noqa: E402

STEPS = {"autoencoder": 4000, "decoder": 3000, "unet": 12000, "canny": 3500, "mask": 900}
STAGES = ("autoencoder", "decoder", "unet", "checkpoint", "canny", "mask")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE",
                        help=f"what to make, of {', '.join(STAGES)} (default: all in turn); those before it are made, "
                             f"too, but canny and mask need nothing more than the checkpoint in --weights")
    parser.add_argument("--folder", type=Path, help="for its state (default: demo_model in the cache folder)")
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights",
                        help="folder for what is made (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a trial (default: 1)")
    # Set when the script runs again in the Python that runs ComfyUI.
    parser.add_argument("--comfyui", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"{min(unknown)} is none of {', '.join(STAGES)}")
    return options


class Making:
    """The stages of the training in `folder`. Each takes what it needs from the stages before it, which are done."""

    def __init__(self, folder: Path, weights: Path, share: float):
        import torch

        from demo_model import world
        self.folder, self.weights = folder, weights
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.steps = {stage: max(1, round(count * share)) for stage, count in STEPS.items()}
        self.world = world.load_world(folder)

    def train(self, stage: str, model, loss_of_batch, rates: list[dict], **options):
        from demo_model.loop import train
        return train(model, loss_of_batch, rates, self.steps[stage], self.folder / f"{stage}.pt", **options)

    def seen(self):
        """The images that training may see."""
        from demo_model.world import to_images
        return to_images(self.world.drawings[self.world.training]).to(self.device)

    def autoencoder(self):
        """Encoder and decoder together; with the encoder the latents are settled."""
        import torch

        from demo_model.autoencoder import LEARNING_RATE, Autoencoder, autoencoder_loss
        torch.manual_seed(0)
        model = Autoencoder().to(self.device, memory_format=torch.channels_last)
        return self.train("autoencoder", model, autoencoder_loss(model, self.seen()),
                          [{"params": list(model.parameters()), "lr": LEARNING_RATE}])

    def decoder(self):
        """The decoder alone, further."""
        from demo_model.autoencoder import LEARNING_RATE, autoencoder_loss
        model = self.autoencoder()
        model.taesd_decoder.requires_grad_(True)
        return self.train("decoder", model, autoencoder_loss(model, self.seen()),
                          [{"params": list(model.taesd_decoder.parameters()), "lr": LEARNING_RATE / 2}])

    @cached_property
    def varied(self):
        from demo_model.samples import varied_drawings
        return varied_drawings(self.world)

    @cached_property
    def latents(self):
        """(latents of the varied drawings with deviation 1, the encoder's deviation)."""
        from demo_model.samples import encode
        return encode(self.varied, self.autoencoder().taesd_encoder)

    def samples(self, latents, controls=None):
        from demo_model.samples import Samples, load_contexts
        return Samples(latents, load_contexts(self.world, self.folder), controls, self.world)

    def unet(self):
        """The denoiser, of upright drawings; a control meets mirrored ones as well."""
        from demo_model.denoiser import LEARNING_RATE, denoising_loss, new_unet
        from demo_model.samples import UPRIGHT
        unet = new_unet().to(self.device)
        loss = denoising_loss(lambda x, timestep, caption, _: unet(x, timesteps=timestep, context=caption),
                              self.samples(self.latents[0][:, :UPRIGHT]), self.device)
        return self.train("unet", unet, loss, [{"params": list(unet.parameters()), "lr": LEARNING_RATE}])

    @cached_property
    def pack(self):
        """ComfyUI's nodes and the pack's, with the checkpoint among ComfyUI's models."""
        import in_process
        import stand_in

        from demo_model import provide
        pack = in_process.Pack()
        stand_in.save(provide.checkpoint(self.weights / provide.CHECKPOINT),
                      pack.models / "checkpoints" / provide.CHECKPOINT)
        return pack

    def canny(self) -> None:
        self.control("canny")

    def mask(self) -> None:
        self.control("mask")

    def control(self, kind: str) -> None:
        """Train a control for the finished checkpoint, by the pack's own node."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        from demo_model.control import train
        folder = train(self.pack.run, self.pack.models.parent, self.world, kind, self.steps[kind])
        for file in folder.iterdir():
            with safe_open(file, "pt") as opened:
                self.save(load_file(file), f"{kind}_{file.name}", opened.metadata())

    def checkpoint(self) -> None:
        """Write UNet and VAE, and the drawings that they never saw."""
        from demo_model.autoencoder import narrow_vae
        from demo_model.provide import CHECKPOINT, UNET, VAE
        from demo_model.world import save_held_out
        tensors = {UNET + name: tensor for name, tensor in self.unet().state_dict().items()}
        vae = narrow_vae(self.decoder(), self.latents[1])
        tensors |= {VAE + name: tensor for name, tensor in vae.items()}
        self.save(tensors, CHECKPOINT)
        save_held_out(self.world, self.weights)

    def save(self, tensors: dict, file: str, metadata: dict | None = None) -> None:
        from safetensors.torch import save_file
        self.weights.mkdir(exist_ok=True)
        save_file({name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}, self.weights / file,
                  metadata)


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Train ControlNeXt keeps what it trained then, too
    folder = options.folder or environment.cache_folder() / "demo_model"
    if options.comfyui:
        sys.path.insert(0, str(options.comfyui))
        import torch
        base = environment.base_directory(folder / "comfyui")
        sys.argv = [sys.argv[0], "--base-directory", str(base), "--use-pytorch-cross-attention",
                    *([] if torch.cuda.is_available() else ["--cpu"])]
        import comfy.options
        comfy.options.enable_args_parsing()
        making = Making(folder, options.weights, options.share)
        for stage in options.stages or STAGES:
            getattr(making, stage)()
        print(f"The weights are in {options.weights}")
    else:
        python, comfyui = environment.set_up()
        environment.become(python, [__file__, "--comfyui", str(comfyui), *sys.argv[1:]])


if __name__ == "__main__":
    main()
