"""A real ComfyUI server as a process, and the part of its HTTP and websocket interface that the demo and the tests use.

Runs in the Python that runs ComfyUI, for aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp

OnEvent = Callable[[str, dict], None]
# A proxy that the environment names cannot reach a server on this machine.
open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class ComfyError(RuntimeError):
    """ComfyUI did not start, refused a graph or failed in one of its nodes; the message is one sentence."""


@contextlib.contextmanager
def running_server(comfyui: Path, base: Path, port: int = 0, options: tuple[str, ...] = ()) -> Iterator[str]:
    """Start `comfyui`/main.py on `port` (0: any free one) with the base directory `base`; stop it at the end.

    Yields its URL when it answers; its output goes to `base`/server.log. Raises ComfyError when it does not start.
    """
    port = _claim_port(port)
    url = f"http://127.0.0.1:{port}"
    # The database would lie in ComfyUI's own folder, which stays untouched.
    command = [sys.executable, comfyui / "main.py", "--base-directory", base, "--port", str(port),
               "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *options]

    with open(base / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=base)

    try:
        while not _answers(url):
            if process.poll() is not None:
                raise ComfyError(f"ComfyUI ended while it was starting; {base / 'server.log'} says why.")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def get_json(url: str):
    """The JSON that a GET of `url` answers."""
    with open_url(url, timeout=60) as answer:
        return json.load(answer)


def inputs_of(url: str) -> Callable[[str], dict]:
    """What ``graph.to_prompt`` asks of a server: a node's type -> what it takes."""
    described = get_json(f"{url}/object_info")
    return lambda kind: described[kind]["input"]


def run_graph(url: str, graph: dict, on_event: OnEvent = lambda kind, data: None) -> dict[str, dict]:
    """Queue `graph` (API format: {node id: {"class_type", "inputs"}}) and wait until it has run.

    `on_event` gets each message of the websocket about this graph: its type ("executing", "progress", ...), its data.
    Returns {node id: the node's shown output}, such as {"images": [{"filename", "subfolder", "type"}]}. Raises
    ComfyError with ComfyUI's own message when a node refuses its inputs or fails.
    """
    return asyncio.run(_run_graph(url, graph, on_event))


async def _run_graph(url: str, graph: dict, on_event: OnEvent) -> dict[str, dict]:
    client = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session,
        session.ws_connect("/ws", params={"clientId": client}, max_msg_size=0) as websocket,
    ):
        async with session.post("/prompt", json={"prompt": graph, "client_id": client}) as response:
            answer = await response.json()
        # ComfyUI accepts a graph with a wrong part when another part of it can run.
        if response.status != 200 or answer["node_errors"]:
            raise ComfyError(_refusal(answer))
        prompt = answer["prompt_id"]
        async for message in websocket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue  # a preview picture
            event = json.loads(message.data)
            if event["data"].get("prompt_id") != prompt:
                continue
            on_event(event["type"], event["data"])
            # The last message of every run; by then the history holds it.
            if event["type"] == "executing" and event["data"]["node"] is None:
                break
        else:
            raise ComfyError("ComfyUI stopped while it ran the graph.")
        async with session.get(f"/history/{prompt}") as response:
            run = (await response.json())[prompt]
    for kind, data in run["status"]["messages"]:
        if kind == "execution_error":
            raise ComfyError(f"{data['node_type']}: {' '.join(data['exception_message'].split())}")
        if kind == "execution_interrupted":
            raise ComfyError(f"{data['node_type']}: the run was interrupted.")
    return run["outputs"]


def _refusal(answer: dict) -> str:
    for node in answer["node_errors"].values():
        for error in node["errors"]:
            return f"{node['class_type']}: {error['message']}: {error['details']}"
    return f"{answer['error']['message']}: {answer['error']['details']}"


def _answers(url: str) -> bool:
    try:
        get_json(f"{url}/system_stats")
    except OSError:
        return False
    return True


def _claim_port(port: int) -> int:
    with socket.socket() as probe:
        if os.name != "nt":
            # As ComfyUI does: a port is free although a server on it has just ended.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ComfyError(f"Port {port} is in use; choose another with --port.") from error
        return probe.getsockname()[1]
