"""Makes the demonstration's weights: VAE, UNet, and ControlNeXt for Canny and for mask, trained on drawings.

    python demo_model/make.py

Sets up ComfyUI and its Python environment on the first call, as the demo does, fetches the drawings with npm, and
trains one after the other; stopped and called again, it goes on where it was. A GPU takes minutes, a CPU many hours.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path += [str(REPOSITORY / "scripts"), str(REPOSITORY)]  # last, since ComfyUI has a module `nodes` of its own

import environment  # noqa: E402

STEPS = {"autoencoder": 12000, "unet": 40000, "control": 10000}
VARIATIONS = 16  # of each drawing


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for what is made (default: demo_model in the cache folder)")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a trial (default: 1)")
    # Set when the script runs again in the Python that runs ComfyUI.
    parser.add_argument("--comfyui", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, share: float) -> None:
    """Run every stage that is not done yet, and write the weights into `folder`."""
    import agreement
    import numpy as np
    import torch
    import world
    from autoencoder import LEARNING_RATE, Autoencoder, autoencoder_loss, widened
    from control import DROPPED_CAPTIONS, FAMILY, Controlled
    from denoiser import LEARNING_RATE as UNET_LEARNING_RATE
    from denoiser import Samples, denoising_loss, new_unet
    from loop import train
    from safetensors.torch import save_file
    from text import captions_to_contexts

    from controlnext_core.canny import canny
    from controlnext_core.training import reference_files

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {stage: max(1, round(count * share)) for stage, count in STEPS.items()}
    drawn = world.load_world(folder)
    images = world.to_images(drawn.drawings)

    torch.manual_seed(0)
    autoencoder = Autoencoder().to(device, memory_format=torch.channels_last)
    autoencoder = train(autoencoder, autoencoder_loss(autoencoder, images[drawn.training].to(device)),
                        [{"params": list(autoencoder.parameters()), "lr": LEARNING_RATE}], steps["autoencoder"],
                        folder / "autoencoder.pt")

    variations = world.draw_variations(len(images) * VARIATIONS, torch.Generator().manual_seed(0))
    varied = [world.vary(image.expand(VARIATIONS, -1, -1, -1), maps)
              for image, maps in zip(images, variations.split(VARIATIONS), strict=True)]
    with torch.no_grad():
        latents = torch.stack([autoencoder.taesd_encoder(batch.to(device)).cpu() for batch in varied])
    deviation = latents.std().item()
    if not (folder / "contexts.pt").exists():
        torch.save(captions_to_contexts([*drawn.captions, ""]), folder / "contexts.pt")
    contexts = torch.load(folder / "contexts.pt", weights_only=True)

    def samples(control=None) -> Samples:
        controls = control and torch.stack([
            torch.from_numpy(np.stack([control(drawing) for drawing in world.to_drawings(batch)])) for batch in varied])
        return Samples(latents / deviation, contexts, controls, drawn)

    unet = new_unet().to(device)
    unet = train(unet, denoising_loss(lambda x, timestep, caption, _: unet(x, timesteps=timestep, context=caption),
                                      samples(), device),
                 [{"params": list(unet.parameters()), "lr": UNET_LEARNING_RATE}], steps["unet"], folder / "unet.pt")
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in base.items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in widened(autoencoder, deviation).items()}
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()},
              folder / "emoji_sd15.safetensors")

    for kind, control in (("canny", lambda drawing: canny(drawing)[..., 0] > 0), ("mask", agreement.drawn_region)):
        unet.load_state_dict(base)
        controlled = Controlled(unet).to(device)
        trained = train(controlled, denoising_loss(controlled, samples(control), device, DROPPED_CAPTIONS),
                        controlled.rates(), steps["control"], folder / f"{kind}.pt")
        weights = trained.unet.state_dict()
        differences = {name: weights[key] - base[key] for name, key in controlled.trained.items()}
        files = reference_files(trained.module.state_dict(), FAMILY, 1.0, differences)
        (folder / kind).mkdir(exist_ok=True)
        for file, (tensors, metadata) in files.items():
            save_file({name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()},
                      folder / kind / file, metadata)
    print(f"Written to {folder}")


def main() -> None:
    options = parse_arguments()
    folder = options.folder or environment.cache_folder() / "demo_model"
    if options.comfyui:
        sys.path.insert(0, str(options.comfyui))
        import torch
        sys.argv = [sys.argv[0], *([] if torch.cuda.is_available() else ["--cpu"])]
        import comfy.options
        comfy.options.enable_args_parsing()
        make(folder, options.share)
    else:
        python, comfyui = environment.set_up()
        environment.become(python, [__file__, "--comfyui", str(comfyui), *sys.argv[1:]])


if __name__ == "__main__":
    main()
