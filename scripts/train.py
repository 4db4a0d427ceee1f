"""Runs a workflow with Train ControlNeXt without a server, on one GPU or, by torchrun, on several.

    python scripts/train.py "Train ControlNeXt.json"
    torchrun --nproc-per-node 4 scripts/train.py "Train ControlNeXt.json"

The workflow is a file as ComfyUI's page saves it, or in API format. It runs in the ComfyUI that this folder is a custom
node of, in COMFYUI_PATH, or in one that is set up on the first call (environment.py). Options that are not named here
go to ComfyUI, --base-directory for example.

With torchrun, each process trains on a part of every batch and they average their gradients before each step, so N
processes learn as one does with N times grad_accumulation_steps. The first one alone writes, previews, prints, and runs
what comes after the training.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import environment
from graph import load_prompt, types_in

TRAIN = "ControlNeXtTrain"


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(our options, ComfyUI's)."""
    parser = argparse.ArgumentParser(description="Runs a workflow with Train ControlNeXt without a server; with "
                                                 "torchrun, on several GPUs or machines. Other options go to ComfyUI.")
    parser.add_argument("workflow", metavar="WORKFLOW.json", help="saved by ComfyUI's page, or in API format")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="MINUTES",
                        help="how long processes wait for one that says nothing (default: 30)")
    return parser.parse_known_args(arguments)


def find_comfyui() -> Path:
    """The folder of the ComfyUI that this project is a custom node of, or ``environment.enter``'s."""
    around = environment.REPOSITORY.parent.parent
    if "COMFYUI_PATH" not in os.environ and (around / "main.py").is_file():
        return around
    return environment.enter()


def start_comfyui(comfyui: Path, options: list[str]) -> None:
    """ComfyUI with all its nodes in this process, set up as its main.py does, but serving nobody."""
    import in_process
    in_process.load_comfyui(comfyui, *options)
    import utils.extra_config
    from comfy.cli_args import args
    given = [path for paths in args.extra_model_paths_config or () for path in paths]
    for path in (comfyui / "extra_model_paths.yaml", *given):
        if Path(path).is_file():
            utils.extra_config.load_extra_path_config(str(path))

    import folder_paths
    import server

    import nodes
    for kind in ("output", "input", "user"):
        if given := getattr(args, f"{kind}_directory"):
            getattr(folder_paths, f"set_{kind}_directory")(os.path.abspath(given))
    loop = asyncio.new_event_loop()
    server.PromptServer(loop)  # packs look for it when they are loaded
    loop.run_until_complete(nodes.init_extra_nodes(init_api_nodes=False))


def join(timeout: float) -> tuple[int, int]:
    """(number of this process, of all): together with those that torchrun started, each on a GPU of its own."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return 0, 1
    import torch
    torch.distributed.init_process_group(timeout=timedelta(minutes=timeout))
    return int(os.environ["RANK"]), count


def choose_gpu() -> None:
    """Show this process the one GPU that is its own, before torch looks for them."""
    if "LOCAL_RANK" in os.environ:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        own = int(os.environ["LOCAL_RANK"])
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[own] if own < len(visible) else str(own)


def read(path: str) -> dict:
    """The content of a workflow's file. ValueError: it holds no workflow with one training."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    count = types_in(content).count(TRAIN)
    if count != 1:
        raise ValueError(f"{path} holds {count} Train ControlNeXt nodes; one is expected.")
    return content


def run(content: dict, leads: bool) -> None:
    """Run a workflow to its end. RuntimeError or ValueError: a node is unknown or failed; one sentence."""
    import comfy.model_management
    import execution
    from server import PromptServer

    import nodes

    def interrupt(*_) -> None:
        comfy.model_management.interrupt_current_processing()

    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, interrupt)  # so that what was trained is kept

    try:
        prompt = load_prompt(content, lambda kind: nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES())
    except KeyError as error:
        raise ValueError(f"the workflow needs the node {error}, which this ComfyUI lacks; install its pack.") from error
    valid, error, outputs, of_nodes = asyncio.run(execution.validate_prompt("train", prompt, None))
    if not valid:
        raise ValueError(" ".join([error["message"], error.get("details", ""), *_sentences(of_nodes)]))

    executor = execution.PromptExecutor(PromptServer.instance, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    trainings = [name for name, node in prompt.items() if node["class_type"] == TRAIN]
    executor.execute(prompt, "train", {}, outputs if leads else trainings)
    if not executor.success:
        raise RuntimeError(_reason(executor.status_messages))


def _sentences(of_nodes: dict) -> list[str]:
    return [f"{one['class_type']}: {error['message']} ({error['details']})." for one in of_nodes.values()
            for error in one["errors"]]


def _reason(messages: list[tuple[str, dict]]) -> str:
    for event, data in messages:
        if event == "execution_error":
            return f"{data['node_type']}: {data['exception_message'].strip()}"
    return "the training was stopped."


def main() -> None:
    options, for_comfyui = parse_arguments()
    try:
        content = read(options.workflow)
    except ValueError as error:
        sys.exit(f"Error: {error}")

    comfyui = find_comfyui()
    choose_gpu()
    start_comfyui(comfyui, for_comfyui)
    own, count = join(options.timeout)
    if own:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        run(content, own == 0)
    except (RuntimeError, ValueError) as error:
        if own == 0:
            print(f"Error: {error}", file=sys.stderr, flush=True)
        # ended at once: torch's own end would wait for processes that are gone
        os._exit(1)
    if count > 1:
        import torch
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
