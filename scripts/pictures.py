"""Remakes the pictures of the help pages (web/docs/<node>/picture.jpg) and the README (screenshots/) by running nodes.

    python scripts/pictures.py [the options of demo.py]

Needs Chromium on PATH.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

import demo
import environment

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from playwright.sync_api import Page, Playwright

DOCS = environment.REPOSITORY / "web" / "docs"
README = environment.REPOSITORY / "screenshots"
TRAINING = "training"  # the folder of pictures to train on, in the input folder
LAYOUT = {  # {node of the main job: (left, top, width, height)}
    "checkpoint": (0, 0, 330, 98), "unet_weights": (0, 150, 330, 200), "controlnext": (0, 410, 330, 160),
    "photo": (380, 0, 330, 380), "edges": (380, 430, 330, 130), "apply": (760, 0, 330, 480),
    "show_edges": (760, 530, 330, 260),
    "positive": (1140, 0, 330, 130), "negative": (1140, 180, 330, 130), "latent": (1140, 360, 330, 106),
    "sample": (1520, 0, 300, 262), "decode": (1520, 310, 300, 46), "save": (1520, 405, 300, 385),
}
# A person in fractions of a height, the middle of the hips at (0, 0): the 18 points of the body in OpenPose's order.
STANDING = [(0, -.44), (0, -.33), (-.09, -.33), (-.12, -.18), (-.13, -.04), (.09, -.33), (.12, -.18), (.13, -.04),
            (-.06, 0), (-.06, .2), (-.06, .4), (.06, 0), (.06, .2), (.06, .4), (-.02, -.46), (.02, -.46), (-.05, -.45),
            (.05, -.45)]


def person(middle: tuple[float, float], height: float, *, raised: float = 0.0, width: int = 288,
           canvas_height: int = 512) -> dict:
    """One POSE_KEYPOINT frame with one person: `middle` of the hips and `height` in pixels, arms raised from 0 to 1."""
    points = list(STANDING)
    angle = math.pi * (0.06 + 0.8 * raised)  # between the arm and one that hangs down
    for elbow, wrist, side in ((3, 4, -1), (6, 7, 1)):
        shoulder = points[elbow - 1]
        points[elbow] = (shoulder[0] + side * .15 * math.sin(angle), shoulder[1] + .15 * math.cos(angle))
        points[wrist] = (points[elbow][0] + side * .14 * math.sin(angle * 1.2),
                         points[elbow][1] + .14 * math.cos(angle * 1.2))
    turns = [2 * math.pi * index / 68 for index in range(68)]
    face = [(.06 * math.sin(turn), -.46 - .07 * math.cos(turn)) for turn in turns]

    def hand(x: float, y: float) -> list[tuple[float, float]]:
        """The wrist and five fingers of four joints, thumb first."""
        return [(x, y), *((x + .012 * joint * math.sin(spread), y + .012 * joint * math.cos(spread))
                          for spread in (-.8, -.4, 0, .4, .8) for joint in (1, 2, 3, 4))]

    def pixels(fractions: list) -> list[float]:
        return [value for x, y in fractions for value in (middle[0] + x * height, middle[1] + y * height, 1.0)]

    return {"canvas_width": width, "canvas_height": canvas_height, "people": [{
        "pose_keypoints_2d": pixels(points), "face_keypoints_2d": pixels(face),
        "hand_left_keypoints_2d": pixels(hand(*points[7])), "hand_right_keypoints_2d": pixels(hand(*points[4])),
    }]}


def draw(keypoints: list[dict], colors: str = "controlnext") -> list:
    """The pictures that ControlNeXt Draw Pose makes."""
    from PIL import Image

    from controlnext_core.pose_draw import draw_pose
    from controlnext_core.pose_keypoints import read_pose_keypoints
    return [Image.fromarray(draw_pose(frame, frame.width, frame.height, colors))
            for frame in read_pose_keypoints(keypoints, "keypoints")]


def aligned(frames: list[dict], reference: dict) -> list[dict]:
    """The frames as ControlNeXt Align Pose aligns them."""
    from controlnext_core.pose_align import align_pose
    from controlnext_core.pose_keypoints import read_pose_keypoints, write_pose_keypoints
    return write_pose_keypoints(align_pose(read_pose_keypoints(frames, "keypoints"),
                                           read_pose_keypoints([reference], "reference")[0], prepend_reference=False))


def save_row(pictures: list, captions: list[str], path: Path) -> None:
    """Pictures of one height from left to right with a line of text under each."""
    from PIL import Image, ImageDraw, ImageFont
    gap, line = 8, 28
    row = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, pictures[0].height + line), (32, 32, 36))
    pen, left = ImageDraw.Draw(row), 0
    for picture, caption in zip(pictures, captions, strict=True):
        row.paste(picture, (left, 0))
        pen.text((left + 6, picture.height + 6), caption, font=ImageFont.load_default(15), fill=(220, 220, 220))
        left += picture.width + gap
    row.save(path, quality=88)


def put_training(drawings: np.ndarray, captions: list[str], folder: Path) -> None:
    """Save drawings (N, height, width, 3) with their captions in a folder."""
    from PIL import Image
    folder.mkdir(exist_ok=True)
    for index, (drawing, caption) in enumerate(zip(drawings, captions, strict=True)):
        Image.fromarray(drawing).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")


def open_page(playwright: Playwright, url: str) -> Page:
    """ComfyUI in a window that shows only the graph."""
    import browser
    page = browser.open_page(browser.launch(playwright), url,
                             {"Comfy.Minimap.Visible": False, "Comfy.RightSidePanel.IsOpen": False})
    page.wait_for_timeout(2000)  # until all has glided into place
    return page


def photograph_graph(page: Page, path: Path) -> None:
    """The main job on the canvas, laid out in one view."""
    page.evaluate("""layout => {
        for (const [id, [left, top, width, height]] of Object.entries(layout)) {
            const node = app.graph.getNodeById(id)
            node.pos = [left, top]
            node.setSize([width, height])
        }
        for (const node of [...app.graph.nodes])
            if (!(node.id in layout)) app.graph.remove(node)
        app.canvas.deselectAll()
        app.canvas.ds.scale = 0.8
        app.canvas.ds.offset = [100, 150]
        app.canvas.setDirty(true, true)
    }""", LAYOUT)

    page.wait_for_timeout(1500)
    page.screenshot(path=path, type="jpeg", quality=85, clip={"x": 60, "y": 84, "width": 1500, "height": 690})


def photograph_error(page: Page, graph: dict, unet_weights: str, path: Path) -> None:
    """The page's error when UNet weights are chosen where a ControlNeXt model belongs."""
    graph["controlnext"]["inputs"]["controlnext_name"] = unet_weights
    page.evaluate("graph => app.loadApiJson(graph, 'wrong file')", graph)
    page.wait_for_timeout(1000)
    page.get_by_test_id("queue-button").click()
    page.get_by_role("button", name="View details").first.click(timeout=60_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=path, type="jpeg", quality=88, clip={"x": 1300, "y": 190, "width": 300, "height": 530})


def photograph_nodes(page: Page, nodes: dict[str, str]) -> None:
    """{node of the graph on the canvas, by its id: node type}: each as it looks, into its help page's picture."""
    for node, kind in nodes.items():
        rectangle = page.evaluate("""id => {
            const node = app.graph.getNodeById(id)
            node.setSize([400, 0])
            node.expandToFitContent()
            const [left, top, width, height] = [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]
            app.canvas.deselectAll()
            app.canvas.ds.scale = Math.min(1.6, 800 / height)
            app.canvas.ds.offset = [200 / app.canvas.ds.scale - left, 120 / app.canvas.ds.scale - top]
            for (const other of app.graph.nodes) if (other != node) other.pos = [left + 3000, top]
            app.canvas.setDirty(true, true)
            const scale = app.canvas.ds.scale
            return {x: 190, y: 110, width: width * scale + 20, height: height * scale + 20}
        }""", node)
        page.wait_for_timeout(800)
        page.screenshot(path=DOCS / kind / "picture.jpg", type="jpeg", quality=85, clip=rectangle)


def with_other_nodes(job: dict) -> dict:
    """The main job's graph, and beside it the nodes of the pack that it has no use for."""
    from demo_model import provide
    node, graph = demo.node, copy.deepcopy(job)
    graph["apply"]["inputs"]["end_percent"] = 0.8

    return graph | {
        "control_net": node("ControlNeXtToControlNet", controlnext=["controlnext", 0]),
        "lora": node("ControlNeXtSaveAsLoRA", unet_name=provide.SD3_CANNY_UNET, model=["checkpoint", 0],
                     filename_prefix="loras/ControlNeXt", rank=0),
        "dataset": node("ControlNeXtDataset", folder=TRAINING, vae=["checkpoint", 2], clip=["checkpoint", 1], size=96),
        "train": node("ControlNeXtTrain", model=["checkpoint", 0], dataset=["dataset", 0], steps=4,
                      training_dtype="fp32", gradient_checkpointing=False, preview_every=0),
        "saved": node("ControlNeXtSave", controlnext=["train", 0], filename_prefix="controlnext/ControlNeXt"),
    }


def photograph_run(page: Page, graph: dict) -> None:
    """Run the graph, and photograph its nodes, the whole of it, and an error."""
    from demo_model import provide
    page.evaluate("graph => app.loadApiJson(graph, 'pictures')", graph)
    page.wait_for_timeout(1000)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => ['save', 'lora', 'saved'].every(id => app.nodeOutputs[id])", timeout=600_000)
    page.wait_for_timeout(3000)  # the pictures on the nodes, and the message that the run is over
    photograph_nodes(page, {"controlnext": "ControlNeXtLoader", "apply": "ControlNeXtApply",
                            "control_net": "ControlNeXtToControlNet", "unet_weights": "ControlNeXtUNetLoader",
                            "lora": "ControlNeXtSaveAsLoRA", "dataset": "ControlNeXtDataset",
                            "train": "ControlNeXtTrain", "saved": "ControlNeXtSave"})
    photograph_graph(page, README / "graph.jpg")
    photograph_error(page, graph, provide.CANNY_UNET, README / "error.jpg")


def save_edges(photo: Image.Image) -> None:
    """The help page's picture of ControlNeXt Canny."""
    import numpy as np
    from PIL import Image

    from controlnext_core.canny import canny
    edges = Image.fromarray(canny(np.array(photo)))
    large = (512, 512 * photo.height // photo.width)
    save_row([photo.resize(large), edges.resize(large, Image.Resampling.NEAREST)], ["image", "ControlNeXt Canny"],
             DOCS / "ControlNeXtCanny" / "picture.jpg")


def save_resizes(photo: Image.Image, comfyui: Path, base: Path) -> None:
    """The help page's picture of Apply ControlNeXt's ``resize``: a wide control image for a square picture."""
    import in_process
    import numpy as np
    import torch
    from PIL import Image

    from controlnext_core.canny import canny
    in_process.start_comfyui(comfyui, base)
    images = in_process.Pack().module("nodes.runtime.images")
    wide = Image.new("RGB", (480, 240))
    for left in (0, 240):  # twice, so that crop has something to cut off
        wide.paste(photo.resize((240, 240)), (left, 0))
    edges = Image.fromarray(canny(np.array(wide)))
    hint = torch.from_numpy(np.array(edges)).float().movedim(-1, 0)[None] / 255

    def square(resize: str) -> Image.Image:
        made = images.resized(hint, 240, 240, resize)[0].movedim(0, -1)
        return Image.fromarray((255 * made.clamp(0, 1)).round().byte().numpy())
    save_row([edges, *map(square, images.RESIZES)], ["the control image", *images.RESIZES],
             DOCS / "ControlNeXtApply" / "resize.png")


def save_poses() -> None:
    """The help pages' pictures of ControlNeXt Align Pose and Draw Pose."""
    reference = person((144, 300), 370)
    dance = [person((110, 350), 240, raised=raised) for raised in (0, .5)]
    save_row(draw([reference, dance[1], aligned(dance, reference)[1]]), ["reference", "keypoints: a frame", "aligned"],
             DOCS / "ControlNeXtAlignPose" / "picture.jpg")
    raised = [person((144, 300), 370, raised=1)]
    save_row([*draw(raised), *draw(raised, "openpose")], ["colors: controlnext", "colors: openpose"],
             DOCS / "ControlNeXtDrawPose" / "picture.jpg")


def run(options: argparse.Namespace, comfyui: Path) -> None:
    import comfy_client
    from PIL import Image
    from playwright.sync_api import sync_playwright

    from demo_model import provide
    from demo_model.drawings import load_held_out
    README.mkdir(exist_ok=True)
    base = environment.base_directory(environment.cache_folder() / "base")
    job, file = demo.prepare_job(options, comfyui, base)
    put_training(*load_held_out(provide.WEIGHTS), base / "input" / TRAINING)
    save_edges(Image.open(file).convert("RGB"))

    device = ("--cpu",) if demo.needs_cpu_option() else ()
    with comfy_client.running_server(comfyui, base, options=device) as url:
        with sync_playwright() as playwright:
            photograph_run(open_page(playwright, url), with_other_nodes(job))
        outputs = comfy_client.run_graph(url, job)  # an event loop of its own

    shown = (demo.image_path(base, outputs[node]) for node in ("show_edges", "save"))
    demo.save_side_by_side(file, *shown, README / "demo.jpg")
    save_poses()
    save_resizes(Image.open(file).convert("RGB"), comfyui, base)


if __name__ == "__main__":
    environment.command(run, demo.parse_arguments())
