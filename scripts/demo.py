"""The main job in a real ComfyUI: takes the edges of a photograph and samples a picture under their control.

    python scripts/demo.py

Sets up ComfyUI and its Python environment on the first call (environment.py), starts ComfyUI's server, and queues

    CheckpointLoaderSimple -+-> (ControlNeXtUNetLoader) -> ControlNeXtApply -> KSampler -> VAEDecode -> SaveImage
    LoadImage -> ControlNeXtCanny ----------------------->+
    ControlNeXtLoader ----------------------------------->+

through its HTTP interface. Without --checkpoint and --controlnext it makes weights of random numbers (stand_in.py).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

import environment


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Samples a picture under the control of a photograph's edges, in a "
                                                 "real ComfyUI that is set up on the first call.")
    parser.add_argument("--checkpoint", type=existing_file, metavar="FILE", help="an SD1.5 or SDXL checkpoint")
    parser.add_argument("--controlnext", type=existing_file, metavar="FILE", help="a ControlNeXt model for it")
    parser.add_argument("--unet-weights", type=existing_file, metavar="FILE", help="the UNet weights that came with it")
    parser.add_argument("--image", type=existing_file, metavar="FILE", help="a photograph (default: an astronaut's)")
    parser.add_argument("--prompt", default="a portrait of an astronaut, oil painting")
    parser.add_argument("--negative", default="blurry, low quality", metavar="PROMPT")
    parser.add_argument("--size", type=parse_size, default=(512, 512), metavar="WIDTHxHEIGHT",
                        help="of the picture, multiples of 8 (default: 512x512)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: 20, with random weights 8)")
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=1.0, help="of the control; 0 is off")
    parser.add_argument("--port", type=int, default=0, help="of the server (default: any free one)")
    parser.add_argument("--keep-open", action="store_true", help="leave the server running for a browser until Ctrl+C")
    # Set when the script runs again in the Python that runs ComfyUI.
    parser.add_argument("--comfyui", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text).absolute()


def parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 64 and int(side) % 8 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 512 or 768x512, in multiples of 8 from 64 on")
    return int(sides[0]), int(sides[-1])


def main_job(checkpoint: str, controlnext: str, image: str, *, size: tuple[int, int], steps: int, prompt: str = "",
             negative: str = "", cfg: float = 7.0, seed: int = 0, strength: float = 1.0,
             unet_weights: str | None = None) -> dict:
    """The graph of the main job in ComfyUI's API format: files by the names in its lists, `size` as (width, height)."""
    width, height = size

    def node(class_type: str, **inputs) -> dict:
        return {"class_type": class_type, "inputs": inputs}

    graph = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "controlnext": node("ControlNeXtLoader", controlnext_name=controlnext, variant="auto"),
        "photo": node("LoadImage", image=image),
        "edges": node("ControlNeXtCanny", image=["photo", 0], threshold="auto", low_threshold=100, high_threshold=200),
        "show_edges": node("PreviewImage", images=["edges", 0]),
        "apply": node("ControlNeXtApply", model=["checkpoint", 0], controlnext=["controlnext", 0], image=["edges", 0],
                      strength=strength, start_percent=0.0, end_percent=1.0),
        "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text=negative),
        "latent": node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "sample": node("KSampler", model=["apply", 0], positive=["positive", 0], negative=["negative", 0],
                       latent_image=["latent", 0], seed=seed, steps=steps, cfg=cfg, sampler_name="euler",
                       scheduler="normal", denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="controlnext_demo"),
    }
    if unet_weights:
        graph["unet_weights"] = node("ControlNeXtUNetLoader", model=["checkpoint", 0], unet_name=unet_weights,
                                     strength=1.0, mode="auto")
        graph["apply"]["inputs"]["model"] = ["unet_weights", 0]
    return graph


def put_photo(image: Path | None, size: tuple[int, int], folder: Path) -> Path:
    """Cut the photograph (None: the astronaut's in scikit-image) to `size` and save it in ComfyUI's input folder."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    try:
        if image is None:
            from skimage import data
            photo = Image.fromarray(data.astronaut())
        else:
            photo = ImageOps.exif_transpose(Image.open(image)).convert("RGB")
    except ImportError as error:
        raise ValueError("The default photograph is scikit-image's, which this Python lacks; give --image.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"--image: {image} is not a picture that can be read.") from error
    path = folder / "controlnext_demo.png"
    ImageOps.fit(photo, size).save(path)
    return path


def put_weights(file: Path, folder: Path) -> str:
    """Link a weight file into one of ComfyUI's model folders, or copy it where links are not allowed.

    Returns the name that ComfyUI lists it by. It goes into a subfolder, so that files which the user put there stay.
    """
    place = folder / "given" / file.name
    place.parent.mkdir(exist_ok=True)
    if not (place.exists() and place.samefile(file)):
        place.unlink(missing_ok=True)
        try:
            place.symlink_to(file)
        except OSError:
            shutil.copyfile(file, place)
    return str(place.relative_to(folder))


def show_progress(graph: dict):
    """A receiver of the websocket's messages that prints each node as it begins, and the steps of the sampler."""
    start = time.monotonic()

    def on_event(kind: str, data: dict) -> None:
        if kind == "executing" and data["node"]:
            print(f"  {time.monotonic() - start:5.1f} s  {graph[data['node']]['class_type']}", flush=True)
        if kind == "progress":
            print(f"  {time.monotonic() - start:5.1f} s    step {data['value']} of {data['max']}", flush=True)

    return on_event


def image_path(base: Path, shown: dict) -> Path:
    """Where the picture lies that a node showed: its type names the folder of the base directory."""
    image = shown["images"][0]
    return base / image["type"] / image["subfolder"] / image["filename"]


def save_side_by_side(pictures: list[Path], path: Path) -> None:
    """Save pictures of one size as one, from left to right."""
    from PIL import Image
    opened = [Image.open(picture).convert("RGB") for picture in pictures]
    width, height = opened[0].size
    row = Image.new("RGB", (width * len(opened), height))
    for index, picture in enumerate(opened):
        row.paste(picture, (width * index, 0))
    row.save(path)


def needs_cpu_option() -> bool:
    """Whether ComfyUI must be told to run on the CPU, for want of anything else that torch can use."""
    import torch
    return not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available())


def run(options: argparse.Namespace) -> None:
    import comfy_client
    import stand_in
    base = environment.base_directory(environment.cache_folder() / "base")
    checkpoint, controlnext = stand_in.CHECKPOINT, stand_in.CONTROLNEXT
    if not (options.checkpoint and options.controlnext):
        print("Without both --checkpoint and --controlnext, random numbers take the place of the missing weights: the "
              "picture shows that control goes from the photograph through a real ComfyUI into the sampling, but is no "
              "drawing.", flush=True)
        stand_in.provide(options.comfyui, base / "models")
    if options.checkpoint:
        checkpoint = put_weights(options.checkpoint, base / "models" / "checkpoints")
    if options.controlnext:
        controlnext = put_weights(options.controlnext, base / "models" / "controlnext")
    unet_weights = options.unet_weights and put_weights(options.unet_weights, base / "models" / "controlnext")
    photo = put_photo(options.image, options.size, base / "input")
    steps = options.steps or (20 if options.checkpoint else 8)
    graph = main_job(checkpoint, controlnext, photo.name, size=options.size, steps=steps, prompt=options.prompt,
                     negative=options.negative, cfg=options.cfg, seed=options.seed, strength=options.strength,
                     unet_weights=unet_weights)

    print("Starting ComfyUI ...", flush=True)
    device = ("--cpu",) if needs_cpu_option() else ()
    with comfy_client.running_server(options.comfyui, base, options.port, device) as url:
        print(f"Running the graph on {url} ...", flush=True)
        outputs = comfy_client.run_graph(url, graph, show_progress(graph))
        picture, edges = image_path(base, outputs["save"]), image_path(base, outputs["show_edges"])
        side_by_side = picture.with_name(f"{picture.stem}side_by_side.png")
        save_side_by_side([photo, edges, picture], side_by_side)
        print(f"Picture: {picture}\nPhotograph, edges and picture side by side: {side_by_side}", flush=True)
        if options.keep_open:
            print(f"ComfyUI is open at {url} until Ctrl+C; drop the picture there to see the graph.", flush=True)
            while True:
                time.sleep(1)


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    try:
        if options.comfyui:
            run(options)
        else:
            python, comfyui = environment.set_up()
            environment.become(python, [__file__, "--comfyui", str(comfyui), *sys.argv[1:]])
    except (RuntimeError, ValueError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
