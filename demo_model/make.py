"""Makes a base of the demonstration: VAE, denoiser, and ControlNeXt for Canny and for mask, trained on drawings.

    python demo_model/make.py --base sd3
    python demo_model/make.py all --base sd3 --minutes 8
    python demo_model/make.py --pack FOLDER          puts what a machine without a network needs into a folder
    python demo_model/make.py all --base sd3_192 --packed FOLDER --minutes 8

Sets up ComfyUI and its Python environment on the first call, as the demo does, fetches the drawings with npm, and
trains one after the other; stopped and called again, it goes on where it was. The controls are trained by Train
ControlNeXt, on the finished checkpoint. A GPU takes minutes, a CPU many hours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
# last, since ComfyUI has a module `nodes` of its own
sys.path += [str(REPOSITORY / "scripts"), str(REPOSITORY / "benchmarks"), str(REPOSITORY)]

import environment  # noqa: E402
import in_process  # noqa: E402
from on_gpu import pack as packing  # noqa: E402

from demo_model.bases import BASES, WEIGHTS, Base  # noqa: E402

CONTROLS = ("canny", "mask", "super_resolution")
STAGES = ("autoencoder", "decoder", "denoiser", "checkpoint", *CONTROLS)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE",
                        help=f"one or more of {', '.join(STAGES)} (default: all, in turn); those before it are made, "
                             f"too, but {', '.join(CONTROLS)} need nothing more than the checkpoint in --weights")
    parser.add_argument("--base", choices=BASES, default="sd15", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for its state (default: demo_model in the cache folder)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS,
                        help="folder for what is made (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="share of the steps, for a trial (default: 1)")
    parser.add_argument("--minutes", type=float, help="end after so many; called again, it goes on where it was")
    parser.add_argument("--pack", type=Path, metavar="FOLDER",
                        help="put the drawings of many sets, ComfyUI and packages into it, and make nothing")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="take them from it")

    options = parser.parse_args()
    options.base = BASES[options.base]
    options.stages = [] if options.stages == ["all"] else options.stages
    if unknown := set(options.stages) - set(stages_of(options.base)):
        parser.error(f"{min(unknown)} is none of {', '.join(stages_of(options.base))}")
    return options


def stages_of(base: Base) -> list[str]:
    """The stages of a base, in turn."""
    return [stage for stage in STAGES if stage == "checkpoint" or stage in base.steps]


class Making:
    """The stages of a base's training in `folder`. Each takes what it needs from those before it, which are done.

    Args:
        share: of the steps.
        data: the folder with the drawings.
        new_pack: gives ComfyUI's nodes and the pack's.
    """

    def __init__(self, base: Base, folder: Path, weights: Path, share: float, data: Path,
                 new_pack: Callable[[], in_process.Pack] = in_process.Pack):
        import torch

        from demo_model.drawings import load_drawings
        self.base, self.folder, self.weights = base, folder, weights
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.steps = {stage: max(1, round(count * share)) for stage, count in base.steps.items()}
        self.drawings, self.new_pack = load_drawings(data, base.data), new_pack

    def make(self, stages: list[str]) -> None:
        for stage in stages:
            self.control(stage) if stage in CONTROLS else getattr(self, stage)()

    def train(self, stage: str, model: nn.Module, loss_of_batch: Callable, rates: list[dict], **options):
        from demo_model.loop import train
        return train(model, loss_of_batch, rates, self.steps[stage],
                     self.folder / f"{self.base.name}_{stage}.pt", **options)

    def loss_of(self, model: nn.Module, stage: str):
        """The loss of an autoencoder on the drawings that training may see."""
        import torch

        from demo_model.autoencoder import autoencoder_loss
        seen = torch.from_numpy(self.drawings.pictures[self.drawings.training]).to(self.device)
        return autoencoder_loss(model, seen, self.base.batches[stage], self.base.crop)

    def autoencoder(self):
        """Encoder and decoder together; with the encoder the latents are fixed."""
        import torch

        from demo_model.autoencoder import LEARNING_RATE, Autoencoder
        torch.manual_seed(0)
        model = Autoencoder(self.base.channels)
        if self.base.start:
            model.begin_as(self.trained_vae(BASES[self.base.start]))
        model = model.to(self.device, memory_format=torch.channels_last)
        return self.train("autoencoder", model, self.loss_of(model, "autoencoder"),
                          [{"params": list(model.parameters()), "lr": LEARNING_RATE}], average=0.99)

    def trained_vae(self, base: Base):
        """The autoencoder in the checkpoint of another base."""
        from safetensors.torch import load_file

        from demo_model import provide
        from demo_model.autoencoder import load_narrow
        return load_narrow(provide.part(load_file(provide.source(base.checkpoint)), provide.VAE))

    def decoder(self):
        """Only the decoder, further."""
        from demo_model.autoencoder import LEARNING_RATE
        model = self.autoencoder()
        model.taesd_decoder.requires_grad_(True)
        return self.train("decoder", model, self.loss_of(model, "decoder"),
                          [{"params": list(model.taesd_decoder.parameters()), "lr": LEARNING_RATE / 2}], average=0.99)

    @cached_property
    def latents(self):
        """(latents of the varied drawings with mean 0 and std 1, the mean and the std of the encoder's)."""
        from demo_model.samples import Varied, encode
        varied = Varied(self.drawings, self.base.variations, self.device)
        latents = encode(varied, self.autoencoder().taesd_encoder)
        mean, std = latents.mean().item(), latents.std().item()
        return (latents - mean) / std, mean, std

    def denoiser(self):
        """UNet or transformer, trained on upright drawings; a control meets mirrored ones as well."""
        from demo_model.samples import load_texts
        texts, upright = load_texts(self.drawings, self.folder, self.base), self.base.variations[0]
        model, loss, rate = getattr(self, self.base.family)(self.latents[0][:, :upright], texts)
        return self.train("denoiser", model, loss, [{"params": list(model.parameters()), "lr": rate}])

    def sd15(self, latents: torch.Tensor, texts: tuple[torch.Tensor, torch.Tensor]):
        """The UNet, the loss of a batch, the learning rate."""
        from demo_model.denoiser import LEARNING_RATE, denoising_loss, new_unet
        from demo_model.samples import Samples
        unet = new_unet().to(self.device)
        loss = denoising_loss(lambda x, timestep, caption, _: unet(x, timesteps=timestep, context=caption),
                              Samples(latents, texts[0], None, self.drawings), self.base.batches["denoiser"])
        return unet, loss, LEARNING_RATE

    def sd3(self, latents: torch.Tensor, texts: tuple[torch.Tensor, torch.Tensor]):
        """The transformer, the loss of a batch, the learning rate."""
        from demo_model.samples import Samples
        from demo_model.text import Texts
        from demo_model.transformer import LEARNING_RATE, flow_loss, new_transformer
        transformer = new_transformer(self.base).to(self.device)
        loss = flow_loss(transformer, Samples(latents, Texts(*texts), None, self.drawings),
                         self.base.batches["denoiser"])
        return transformer, loss, LEARNING_RATE

    @cached_property
    def pack(self):
        """ComfyUI's nodes and the pack's, with the checkpoint among ComfyUI's models."""
        import stand_in

        from demo_model import provide
        pack = self.new_pack()
        stand_in.save(provide.checkpoint(self.base, self.weights),
                      pack.models / "checkpoints" / self.base.checkpoint)
        return pack

    def control(self, kind: str) -> None:
        """Train a control for the finished checkpoint, by the pack's own node."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        from demo_model.control import train
        folder = train(self.pack.run, self.pack.models.parent, drawings=self.drawings, base=self.base, kind=kind,
                       steps=self.steps[kind], encoded=self.folder / f"{self.base.name}_encoded.pt")
        for file in folder.iterdir():
            with safe_open(file, "pt") as opened:
                self.save(load_file(file), f"{self.base.prefix}{kind}_{file.name}", opened.metadata())

    def checkpoint(self) -> None:
        """Write denoiser and VAE, and the drawings that they never saw."""
        from demo_model.autoencoder import narrow_vae
        from demo_model.drawings import save_held_out
        from demo_model.provide import UNET, VAE, in_eight_bits
        denoiser = self.denoiser().state_dict()
        tensors = {UNET + name: tensor
                   for name, tensor in (in_eight_bits(denoiser) if self.base.eight_bits else denoiser).items()}
        vae = narrow_vae(self.decoder(), *self.latents[1:], self.base)
        tensors |= {VAE + name: tensor for name, tensor in vae.items()}
        self.save(tensors, self.base.checkpoint)
        save_held_out(self.drawings, self.weights, self.base.data)

    def save(self, tensors: dict, name: str, metadata: dict | None = None) -> None:
        from safetensors.torch import save_file

        from demo_model.provide import source
        self.weights.mkdir(exist_ok=True)
        save_file({key: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
                   for key, tensor in tensors.items()}, self.weights / source(name).name, metadata)


def end_after(minutes: float | None) -> None:
    """Let SIGTERM end this process so that Train ControlNeXt keeps what it trained, and raise it in so many minutes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if minutes is not None:
        timer = threading.Timer(60 * minutes, signal.raise_signal, (signal.SIGTERM,))
        timer.daemon = True
        timer.start()


def pack_all(folder: Path, packed: Path) -> None:
    """Put the drawings of many sets into the folder `packed`, beside what `benchmarks/gpu.py --pack` puts there."""
    from demo_model.drawings import gathered
    packed.mkdir(parents=True, exist_ok=True)
    shutil.copy(gathered(folder), packed)
    packing.pack(packed)


def main() -> None:
    options = parse_arguments()
    end_after(options.minutes)
    folder = options.folder or environment.cache_folder() / "demo_model"
    try:
        os.environ.update(packing.unpacked(options.packed.absolute()) if options.packed else {})
    except environment.SetupError as error:
        sys.exit(f"Error: {error}")

    comfyui = environment.enter()
    if options.pack:
        return pack_all(folder, options.pack.absolute())
    in_process.start_comfyui(comfyui, folder / "comfyui")
    making = Making(options.base, folder, options.weights, options.share, options.packed or folder)
    making.make(options.stages or stages_of(options.base))
    print(f"The weights are in {options.weights}")


if __name__ == "__main__":
    main()
