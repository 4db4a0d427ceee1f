"""The main job in a real ComfyUI: takes the edges of a picture and samples another under their control.

    python scripts/demo.py

Sets up ComfyUI and its Python environment on the first call (environment.py), starts ComfyUI's server, and queues

    CheckpointLoaderSimple -+-> (ControlNeXtUNetLoader) -> ControlNeXtApply -> KSampler -> VAEDecode -> SaveImage
    LoadImage -> ControlNeXtCanny ----------------------->+
    ControlNeXtLoader ----------------------------------->+

through its HTTP interface. Without --checkpoint and --controlnext the project's own small SD3 draws (demo_model).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import environment

# Defaults of the sampling: with the project's own model, which knows drawings of this size by short names, and with a
# given one.
OWN = {"prompt": "cat face", "negative": "", "size": (96, 96), "steps": 16, "cfg": 2.0}
GIVEN = {"prompt": "a cat, oil painting", "negative": "blurry, low quality", "size": (512, 512), "steps": 20,
         "cfg": 7.0}
DRAWING = "cat face"  # by default; the model's training did not see it


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Samples a picture under the control of another's edges, in a "
                                                 "real ComfyUI that is set up on the first call.")
    parser.add_argument("--checkpoint", type=existing_file, metavar="FILE",
                        help="an SD1.5, SDXL or SD3 checkpoint (default: the project's own small SD3 of drawings)")
    parser.add_argument("--controlnext", type=existing_file, metavar="FILE", help="a ControlNeXt model for it")
    parser.add_argument("--unet-weights", type=existing_file, metavar="FILE", help="the UNet weights that came with it")
    parser.add_argument("--image", type=existing_file, metavar="FILE",
                        help="a photograph or drawing (default: a cat's face)")
    parser.add_argument("--prompt", help=f"(default: {OWN['prompt']}; with a given checkpoint: {GIVEN['prompt']})")
    parser.add_argument("--negative", metavar="PROMPT", help=f"(default: none; {GIVEN['negative']})")
    parser.add_argument("--size", type=parse_size, metavar="WIDTHxHEIGHT",
                        help="size of the picture, multiples of 8 (default: 96x96; 512x512)")
    parser.add_argument("--steps", type=int, help=f"steps of the sampler (default: {OWN['steps']}; {GIVEN['steps']})")
    parser.add_argument("--cfg", type=float, help=f"(default: {OWN['cfg']:g}; {GIVEN['cfg']:g})")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--strength", type=float, default=1.0, help="strength of the control; 0 is off")
    parser.add_argument("--port", type=int, default=0, help="port of the server (default: any free one)")
    parser.add_argument("--keep-open", action="store_true", help="leave the server running for a browser until Ctrl+C")

    options = parser.parse_args(arguments)
    if bool(options.checkpoint) != bool(options.controlnext) or (options.unet_weights and not options.checkpoint):
        parser.error("--checkpoint and --controlnext belong together, --unet-weights only to them; give both, or none "
                     "for the project's own model")

    for name, value in (GIVEN if options.checkpoint else OWN).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text).absolute()


def parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 64 and int(side) % 8 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 512 or 768x512, in multiples of 8 from 64 on")
    return int(sides[0]), int(sides[-1])


def node(class_type: str, **inputs) -> dict:
    """A node of a graph in ComfyUI's API format; [node's id, index] for an input that is another's output."""
    return {"class_type": class_type, "inputs": inputs}


def main_job(checkpoint: str, controlnext: str, image: str, *, size: tuple[int, int], steps: int, prompt: str = "",
             negative: str = "", cfg: float = 7.0, seed: int = 0, strength: float = 1.0,
             unet_weights: str | None = None) -> dict:
    """The graph of the main job in ComfyUI's API format: files by the names in its lists, `size` as (width, height)."""
    width, height = size
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
                       scheduler="simple", denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="controlnext_demo"),
    }

    if unet_weights:
        graph["unet_weights"] = node("ControlNeXtUNetLoader", model=["checkpoint", 0], unet_name=unet_weights,
                                     strength=1.0, mode="auto")
        graph["apply"]["inputs"]["model"] = ["unet_weights", 0]
    return graph


def put_photo(image: Path | None, size: tuple[int, int], folder: Path) -> Path:
    """Cut the picture (None: DRAWING) to `size` and save it in ComfyUI's input folder.

    Transparent parts of a drawing become white paper.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError
    try:
        if image is None:
            from demo_model import provide
            from demo_model.drawings import load_held_out
            drawings, captions = load_held_out(provide.WEIGHTS)
            photo = Image.fromarray(drawings[captions.index(DRAWING)])
        else:
            photo = ImageOps.exif_transpose(Image.open(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"--image: {image} is not a picture that can be read.") from error

    paper = Image.new("RGBA", photo.size, "white")
    path = folder / "controlnext_demo.png"
    ImageOps.fit(Image.alpha_composite(paper, photo.convert("RGBA")).convert("RGB"), size).save(path)
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


def files_for_job(options: argparse.Namespace, comfyui: Path, models: Path) -> dict[str, str | None]:
    """Put the weights into ComfyUI's models folder `models`; returns their names for main_job."""
    if options.checkpoint:
        return {"checkpoint": put_weights(options.checkpoint, models / "checkpoints"),
                "controlnext": put_weights(options.controlnext, models / "controlnext"),
                "unet_weights": options.unet_weights and put_weights(options.unet_weights, models / "controlnext")}
    from demo_model import provide
    from demo_model.bases import BASES
    print("Without --checkpoint and --controlnext the project's own small SD3 draws. It knows drawings of animals, "
          "food and things at 96x96 pixels.", flush=True)
    provide.provide(comfyui, models)
    return {"checkpoint": BASES["sd3"].checkpoint, "controlnext": provide.SD3_CANNY,
            "unet_weights": provide.SD3_CANNY_UNET}


def prepare_job(options: argparse.Namespace, comfyui: Path, base: Path) -> tuple[dict, Path]:
    """The graph that the options ask for, and the picture that it reads; their files are in ComfyUI's folders."""
    photo = put_photo(options.image, options.size, base / "input")
    return main_job(**files_for_job(options, comfyui, base / "models"), image=photo.name, size=options.size,
                    steps=options.steps, prompt=options.prompt, negative=options.negative, cfg=options.cfg,
                    seed=options.seed, strength=options.strength), photo


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
    """The path of the picture that a node showed: its type names the folder of the base directory."""
    image = shown["images"][0]
    return base / image["type"] / image["subfolder"] / image["filename"]


def save_side_by_side(photo: Path, edges: Path, picture: Path, path: Path) -> None:
    """Save three pictures of one size as one, from left to right; small ones are enlarged."""
    from PIL import Image
    width, height = Image.open(photo).size
    scale = max(1, 384 // width)
    row = Image.new("RGB", (3 * width * scale, height * scale))
    for index, file in enumerate((photo, edges, picture)):
        resampling = Image.Resampling.NEAREST if file == edges else Image.Resampling.BICUBIC
        enlarged = Image.open(file).convert("RGB").resize((width * scale, height * scale), resampling)
        row.paste(enlarged, (width * scale * index, 0))
    row.save(path)


def needs_cpu_option() -> bool:
    """Whether ComfyUI must be told to run on the CPU, for want of anything else that torch can use."""
    import torch
    return not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available())


def run(options: argparse.Namespace, comfyui: Path) -> None:
    import comfy_client
    base = environment.base_directory(environment.cache_folder() / "base")
    graph, photo = prepare_job(options, comfyui, base)

    print("Starting ComfyUI ...", flush=True)
    device = ("--cpu",) if needs_cpu_option() else ()
    with comfy_client.running_server(comfyui, base, options.port, device) as url:
        print(f"Running the graph on {url} ...", flush=True)
        outputs = comfy_client.run_graph(url, graph, show_progress(graph))

        picture, edges = image_path(base, outputs["save"]), image_path(base, outputs["show_edges"])
        side_by_side = picture.with_name(f"{picture.stem}side_by_side.png")
        save_side_by_side(photo, edges, picture, side_by_side)
        print(f"Picture: {picture}\nPhotograph, edges and picture side by side: {side_by_side}", flush=True)
        if options.keep_open:
            print(f"ComfyUI is open at {url} until Ctrl+C; drop the picture there to see the graph.", flush=True)
            while True:
                time.sleep(1)


if __name__ == "__main__":
    environment.command(run, parse_arguments())
