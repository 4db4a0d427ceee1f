"""Remakes the thumbnails of the example workflows by running them on the project's own small models (demo_model).

    python scripts/thumbnails.py
    python scripts/thumbnails.py "SD3 Canny" "SD3 Super Resolution"

Each workflow, or each one named, is opened in ComfyUI's frontend (Chromium on PATH) and runs as it stands in the file,
but for this: the files are those of the small model of its base, with its place of control and, for the release's
strengths, those of controls that were trained at 1; the picture is a drawing
with its own size and prompt; and the drawing's silhouette stands for what needs models that cannot be had here
(background removal, depth). Training is on the drawings that the small model was trained on, which npm fetches, with
SETTINGS; the ControlNet to learn from is the one of benchmarks/convergence.py, which trains it first. There is no small
model for poses: those workflows show poses and no result; nor one of Flux and Wan: those show their graph. A workflow
with a node of another pack needs that pack in base/custom_nodes in the cache folder; without it its thumbnail stays as
it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import demo
import environment
import pictures

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from playwright.sync_api import Page

    from demo_model.bases import Base

EXAMPLES = environment.REPOSITORY / "example_workflows"
SIDE = 512  # pixels on a side of a thumbnail
DRAWINGS = {  # workflow: the drawings whose edges or silhouette control it; no training saw these
    "SDXL Canny": ["rooster"], "Control and LoRA": ["flamingo"], "Inpaint with Control": ["cat face"],
    "Compare": ["fish"], "SD1.5 Mask": ["koala"], "Two Controls": ["horse face"], "SDXL Depth": ["bison"],
    "Regional Control": ["flamingo", "cat face"], "Train ControlNeXt": ["horse face"],
    "Train from a Folder": ["horse face"], "Distil a ControlNet": ["cat face"], "SD3 Canny": ["fish"],
}
SMALL = {"SD3 Super Resolution": "cat face"}  # the drawing that it gets a quarter as wide and high
SHEETS = {"Tiled Upscale with Control": ["open lock", "rooster", "camera", "horse face"]}  # one loads four drawings
POSES = {"SD1.5 Pose": (1, 1), "SVD Pose Video": (3, 1), "SVD Long Pose Video": (3, 2)}  # columns and rows of people
GRAPHS = {"Flux Canny": 1, "Wan Canny Video": 2}  # the group that the picture begins with
TRAINED = {"Train ControlNeXt", "Train from a Folder"}  # on TRAINING
COMPARED = {"Compare", "Distil a ControlNet", *TRAINED, *SMALL}  # with control and without, half each
LEFT_OUT = ("LoadBackgroundRemovalModel", "LoadDA3Model", "DA3Inference")  # whose result the silhouette stands for
SAMPLING = {"sd15": {"steps": 20, "cfg": 2.0}, "sd3": {name: demo.OWN[name] for name in ("steps", "cfg")}}
STRENGTHS = {0.35: 1.0, 0.21: 0.6}  # the SDXL Canny weights' in the files, and what they are of controls trained at 1
CONTROLS = ("canny", "super_resolution")  # that the small models have by these names; mask stands for others
TRAINING = "drawings"  # the folder of pictures to train on, in the input folder
TEACHER = "drawings_canny_teacher.safetensors"  # the ControlNet to learn from
LEARNED_FROM = ["tiger", "duck", "hamburger", "teapot", "guitar", "desktop computer"]  # prompts to draw and learn from
SETTINGS = {  # the training's, for so small a model
    "batch_size": 8, "grad_accumulation_steps": 1, "learning_rate": 1e-3, "unet_learning_rate": 3e-4,
    "scale_learning_rate": 1e-2, "unet_pattern": ".", "inject_at": "conv_in", "min_snr_gamma": 1.0,
    "training_dtype": "fp32", "gradient_checkpointing": False, "caption_dropout": 0.3, "save_every": 0,
    "preview_every": 0,
}
# Ends of the sentence about the thumbnail in a workflow's note, before and after this script made it.
NOT_MADE = "shows the graph and no result: these weights could not be downloaded where it was made."
MADE = ("shows a run of this graph with a small model of drawings, trained for this project; the drawing's silhouette "
        "stands for what needs other models.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Remakes the thumbnails of the example workflows.")
    parser.add_argument("workflows", nargs="*", type=existing_workflow, metavar="WORKFLOW",
                        help="its name (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-steps", type=int, default=500)
    return parser.parse_args()


def existing_workflow(name: str) -> str:
    if not (EXAMPLES / f"{name}.json").is_file():
        raise argparse.ArgumentTypeError(f"there is no workflow {name}")
    return name


def drawing_of(name: str) -> np.ndarray:
    """The drawing of this name, (height, width, 3) uint8."""
    from demo_model.drawings import load_held_out
    from demo_model.provide import WEIGHTS
    drawings, captions = load_held_out(WEIGHTS)
    return drawings[captions.index(name)]


def put_drawing(name: str, repaint: bool, folder: Path) -> str:
    """Save the drawing of this name, transparent in its right half, to be repainted, or outside the drawn region."""
    import numpy as np
    from PIL import Image

    from demo_model.agreement import drawn_region
    drawing = drawing_of(name)
    alpha = np.full(drawing.shape[:2], 255, np.uint8)
    if repaint:
        alpha[:, alpha.shape[1] // 2:] = 0
    else:
        alpha[~drawn_region(drawing)] = 0
    path = folder / f"{name}.png"
    Image.fromarray(np.dstack([drawing, alpha])).save(path)
    return path.name


def put_small(name: str, folder: Path) -> str:
    """Save the drawing of this name a quarter as wide and high."""
    from PIL import Image
    Image.fromarray(drawing_of(name)).reduce(4).save(folder / "small.png")
    return "small.png"


def put_sheet(names: list[str], folder: Path) -> str:
    """Save the four drawings of these names in two rows, small, to be enlarged to twice their width and height."""
    import numpy as np
    from PIL import Image
    upper_left, upper_right, lower_left, lower_right = map(drawing_of, names)
    sheet = Image.fromarray(np.block([[[upper_left], [upper_right]], [[lower_left], [lower_right]]]))
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).save(folder / "sheet.png")
    return "sheet.png"


def put_teacher(folder: Path) -> None:
    """Train TEACHER, unless that was done before, and put it in the folder."""
    folder.mkdir(exist_ok=True)
    benchmark = environment.REPOSITORY / "benchmarks" / "convergence.py"
    subprocess.run([sys.executable, benchmark, "--write-teacher", folder / TEACHER], check=True)


def on_small_model(prompt: dict, options: argparse.Namespace, files: list[str], texts: list[str]) -> dict:
    """The API graph of a workflow on the small model: a file for each picture to load, a text for each prompt."""
    from demo_model.bases import BASES
    kinds = {values["class_type"] for values in prompt.values()}
    base = BASES["sd3" if "EmptySD3LatentImage" in kinds else "sd15"]
    replace_nodes(prompt)
    if not kinds & {"ControlNeXtUNetLoader", "ControlNeXtTrain"}:
        load_mask_weights(prompt)

    changes = changes_on_small_model(base, options, files, texts)
    for values in prompt.values():
        inputs = values["inputs"]
        for name, value in changes.get(values["class_type"], {}).items():
            inputs[name] = value(inputs[name]) if callable(value) else value
    return prompt


def replace_nodes(prompt: dict) -> None:
    """Have the drawing's silhouette stand for what other models make of a picture, and scale to its small size."""
    photo = next(node for node, values in prompt.items() if values["class_type"] == "LoadImage")
    # LoadImage's mask is where a picture is transparent
    prompt["figure_mask"] = demo.node("InvertMask", mask=[photo, 1])
    replacements = {
        "RemoveBackground": lambda _: demo.node("InvertMask", mask=[photo, 1]),
        "DA3Render": lambda _: demo.node("MaskToImage", mask=["figure_mask", 0]),
        # it makes no picture as small as these
        "ImageScaleToTotalPixels": lambda given: demo.node("ImageScale", image=given["image"], crop="disabled",
                                                           upscale_method=given["upscale_method"]),
    }

    for node, values in list(prompt.items()):
        if values["class_type"] in replacements:
            prompt[node] = replacements[values["class_type"]](values["inputs"])
        if values["class_type"] in LEFT_OUT:
            del prompt[node]


def load_mask_weights(prompt: dict) -> None:
    """Put UNet weights before Apply ControlNeXt: the released mask control has none, ours does."""
    from demo_model import provide
    for values in list(prompt.values()):
        if values["class_type"] == "ControlNeXtApply":
            prompt["unet_weights"] = demo.node("ControlNeXtUNetLoader", model=values["inputs"]["model"],
                                               unet_name=provide.MASK_UNET, strength=1.0, mode="auto")
            values["inputs"]["model"] = ["unet_weights", 0]


def changes_on_small_model(base: Base, options: argparse.Namespace, files: list[str], texts: list[str]) -> dict:
    """{node: {input: its value on the small model of a base, or a function from the workflow's value to it}}."""
    from demo_model import provide
    width, height = demo.OWN["size"]
    sampling = SAMPLING[base.name] | {"seed": options.seed}
    next_file, next_text = itertools.cycle(files), itertools.cycle(texts)

    def own(part: str) -> Callable[[str], str]:
        """From a released control's file to the small model's: one of the two that a control has."""
        def own_file(name: str) -> str:
            control = next((control for control in CONTROLS if control in name.replace("-", "_")), "mask")
            return f"{base.prefix}{control}_{part}.safetensors"
        return own_file

    def unless_linked(value: int) -> Callable:
        return lambda given: given if isinstance(given, list) else value

    def strength(given: float) -> float:
        return STRENGTHS.get(given, given)

    return {
        "CheckpointLoaderSimple": {"ckpt_name": base.checkpoint},
        "ControlNeXtLoader": {"controlnext_name": own("controlnet")},
        "ControlNeXtUNetLoader": {"unet_name": own("unet")},
        "ControlNeXtApply": {"strength": strength},
        "ControlNetApplyAdvanced": {"strength": strength},
        "LoraLoader": {"lora_name": provide.LORA},
        "ControlNetLoader": {"control_net_name": TEACHER},
        "LoadImage": {"image": lambda _: next(next_file)},
        "LoadImageTextDataSetFromFolder": {"folder": TRAINING},
        "ControlNeXtDataset": {"folder": TRAINING, "size": width},
        "CLIPTextEncode": {"text": lambda text: "" if not text or "worst quality" in text else next(next_text)},
        "ImageScale": {"width": width, "height": height},
        "EmptyLatentImage": {"width": unless_linked(len(files) * width),  # side by side
                             "height": unless_linked(height)},
        "ControlNeXtTrain": SETTINGS | {"steps": options.training_steps},
        "KSampler": sampling,
        "UltimateSDUpscaleNoUpscale": sampling | {"tile_width": width, "tile_height": height,  # each drawing a tile
                                                  "tile_padding": 0, "mask_blur": 0},
    }


def shown(outputs: dict, prompt: dict, base: Path, kind: str, key: str = "images") -> list:
    """The pictures that the nodes of a kind showed."""
    from PIL import Image
    return [Image.open(demo.image_path(base, {"images": outputs[node][key]})).convert("RGB")
            for node, values in prompt.items() if values["class_type"] == kind]


def compose(result: Image.Image, controls: list[Image.Image]) -> Image.Image:
    """The result in full, its control images small in the lower left corner."""
    from PIL import Image
    picture = result.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    for index, control in enumerate(controls):
        inset = control.resize((SIDE // 4, SIDE // 4), Image.Resampling.NEAREST)
        picture.paste(inset, (index * (SIDE // 4 + 8), SIDE - SIDE // 4))
    return picture


def halves(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures as under a slider in the middle."""
    from PIL import Image
    picture = left.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    picture.paste(right.resize((SIDE, SIDE), Image.Resampling.BICUBIC).crop((SIDE // 2, 0, SIDE, SIDE)), (SIDE // 2, 0))
    picture.paste((255, 255, 255), (SIDE // 2 - 1, 0, SIDE // 2 + 1, SIDE))
    return picture


def above(controls: list[Image.Image], result: Image.Image) -> Image.Image:
    """The control images side by side, the result of all beneath, twice as wide as it is high."""
    from PIL import Image
    picture = Image.new("RGB", (SIDE, SIDE))
    side = SIDE // len(controls)
    for index, control in enumerate(controls):
        picture.paste(control.resize((side, SIDE // 2), Image.Resampling.NEAREST), (index * side, 0))
    picture.paste(result.resize((SIDE, SIDE // 2), Image.Resampling.BICUBIC), (0, SIDE // 2))
    return picture


def poses(columns: int, rows: int) -> Image.Image:
    """A person who raises the arms, frame by frame in a grid, in OpenPose's look, whose lines show when small."""
    from PIL import Image
    picture, count = Image.new("RGB", (SIDE, SIDE)), columns * rows
    width, height = SIDE // columns, SIDE // rows
    size = min(height * .76, width * 1.4)
    frames = [pictures.person((width / 2, height * .58), size, raised=index / max(count - 1, 1), width=width,
                              canvas_height=height) for index in range(count)]
    for index, frame in enumerate(pictures.draw(frames, "openpose")):
        picture.paste(frame, (index % columns * width, index // columns * height))
    return picture


def photograph_graph(page: Page, group: int, path: Path) -> None:
    """The graph on the canvas from its group of this index on, as much as fits a square."""
    from PIL import Image
    page.evaluate("""index => {
        const {pos: [left, top], size: [, height]} = app.graph.groups[index]
        app.canvas.deselectAll()
        app.canvas.ds.scale = 800 / height
        app.canvas.ds.offset = [200 / app.canvas.ds.scale - left, 120 / app.canvas.ds.scale - top]
        app.canvas.setDirty(true, true)
    }""", group)
    page.wait_for_timeout(800)
    page.screenshot(path=path, type="jpeg", quality=95, clip={"x": 200, "y": 120, "width": 800, "height": 800})
    Image.open(path).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(path, quality=88)


def prompts(url: str, workflows: list[str]) -> dict[str, dict]:
    """{workflow: its API graph, as the frontend makes it of the file}, of those whose nodes ComfyUI has.

    The thumbnails of GRAPHS are made here, while the graph is on the canvas.
    """
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        page = pictures.open_page(playwright, url)
        known = set(page.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
        graphs = {}
        for workflow in workflows:
            graph = json.loads((EXAMPLES / f"{workflow}.json").read_text(encoding="utf-8"))
            missing = {node["type"] for node in graph["nodes"]} - known
            if missing:
                print(f"{workflow}: its thumbnail stays as it is, for want of {', '.join(missing)}", flush=True)
                continue
            page.evaluate("async graph => app.loadGraphData(graph)", graph)
            if workflow in GRAPHS:
                photograph_graph(page, GRAPHS[workflow], EXAMPLES / f"{workflow}.jpg")
            else:
                graphs[workflow] = page.evaluate("async () => (await app.graphToPrompt()).output")
        return graphs


def put_given(workflow: str, folder: Path) -> tuple[list[str], list[str]]:
    """Save what a workflow is controlled by in the input folder; returns the files' names and the prompts."""
    if workflow in SHEETS:
        return [put_sheet(SHEETS[workflow], folder)], [""]
    if workflow in SMALL:
        return [put_small(SMALL[workflow], folder)], [SMALL[workflow]]
    names = DRAWINGS[workflow]
    files = [put_drawing(name, workflow == "Inpaint with Control", folder) for name in names]
    return files, LEARNED_FROM + names if workflow == "Distil a ControlNet" else names


def thumbnail(workflow: str, outputs: dict, prompt: dict, base: Path) -> Image.Image:
    """The thumbnail of what the nodes showed."""
    controls = shown(outputs, prompt, base, "PreviewImage")
    if workflow in COMPARED:
        result = halves(*(shown(outputs, prompt, base, "ImageCompare", key)[0] for key in ("a_images", "b_images")))
    else:
        (result,) = shown(outputs, prompt, base, "SaveImage")
    return above(controls, result) if workflow == "Regional Control" else compose(result, controls)


def say_made(file: Path) -> None:
    """Say in a workflow's note how its thumbnail was made."""
    file.write_text(file.read_text(encoding="utf-8").replace(NOT_MADE, MADE), encoding="utf-8", newline="\n")


def run(options: argparse.Namespace, comfyui: Path) -> None:
    import comfy_client
    from PIL import Image

    from demo_model import provide
    from demo_model.drawings import load_drawings
    chosen = options.workflows or sorted(file.stem for file in EXAMPLES.glob("*.json"))
    base = environment.base_directory(environment.cache_folder() / "base")
    provide.provide(comfyui, base / "models")
    if TRAINED & set(chosen):
        drawings = load_drawings(environment.cache_folder() / "demo_model")
        captions = [drawings.captions[index] for index in drawings.training]
        pictures.put_training(drawings.pictures[drawings.training], captions, base / "input" / TRAINING)
    if "Distil a ControlNet" in chosen:
        put_teacher(base / "models" / "controlnet")
    Image.fromarray(drawing_of("cat face")).save(base / "input" / "example.png")  # for GRAPHS, whose files load it

    device = ("--cpu",) if demo.needs_cpu_option() else ()
    with comfy_client.running_server(comfyui, base, options=device) as url:
        for workflow, prompt in prompts(url, [name for name in chosen if name not in POSES]).items():
            prompt = on_small_model(prompt, options, *put_given(workflow, base / "input"))
            outputs = comfy_client.run_graph(url, prompt)
            thumbnail(workflow, outputs, prompt, base).save(EXAMPLES / f"{workflow}.jpg", quality=88)
            say_made(EXAMPLES / f"{workflow}.json")
            print(workflow, flush=True)

    for workflow in POSES.keys() & set(chosen):
        poses(*POSES[workflow]).save(EXAMPLES / f"{workflow}.jpg", quality=88)


if __name__ == "__main__":
    environment.command(run, parse_arguments())
