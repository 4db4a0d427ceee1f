"""Two clients that train and sample at the same time: each gets its own results and messages, one after the other."""

import asyncio
import json

import aiohttp
import comfy_client
import demo
import pytest
import stand_in
from PIL import Image
from safetensors.torch import load_file
from training_graph import graph as training_graph

STEPS = {"one": 2, "other": 3}  # of a client's training, which its texts tell


def training(client: str, filename_prefix: str = "at_once") -> dict:
    return training_graph(steps=STEPS[client], seed=STEPS[client], preview_every=0, filename_prefix=filename_prefix)


def sampling(client: str, variant: str = "auto") -> dict:
    graph = demo.main_job(stand_in.CHECKPOINT, stand_in.CONTROLNEXT, "controlnext_demo.png", size=(64, 64), steps=2,
                          seed=STEPS[client])
    graph["controlnext"]["inputs"]["variant"] = variant
    return graph


async def queue_at_once(url: str, graphs: dict[str, list[dict]]) -> tuple[dict, dict]:
    """({client: its runs' histories}, {client: the messages that it got}); the client None listens to nothing."""
    async with aiohttp.ClientSession(url) as session:
        heard = {client: [] for client in graphs if client}
        sockets = [await session.ws_connect("/ws", params={"clientId": client}, max_msg_size=0) for client in heard]

        async def listen(socket, messages) -> None:
            async for message in socket:
                messages.append(message)
        listening = [asyncio.create_task(listen(*pair)) for pair in zip(sockets, heard.values(), strict=True)]

        async def run(client: str | None, graph: dict) -> dict:
            body = {"prompt": graph} | ({"client_id": client} if client else {})
            async with session.post("/prompt", json=body) as response:
                prompt = (await response.json())["prompt_id"]
            while True:
                async with session.get(f"/history/{prompt}") as response:
                    if found := await response.json():
                        return found[prompt]
                await asyncio.sleep(0.1)

        async def run_all(client: str | None) -> list[dict]:
            return await asyncio.gather(*(run(client, graph) for graph in graphs[client]))
        histories = await asyncio.gather(*map(run_all, graphs))
        await asyncio.sleep(0.2)
        for socket in sockets:
            await socket.close()
        await asyncio.gather(*listening)
    return dict(zip(graphs, histories, strict=True)), heard


@pytest.fixture(scope="module")
def at_once(url, base, pictures):
    demo.put_photo(None, (64, 64), base / "input")
    graphs = {"one": [training("one"), sampling("one")], "other": [sampling("other"), training("other")],
              None: [training_graph(steps=1, preview_every=0)]}
    return asyncio.run(queue_at_once(url, graphs))


def trained(base, outputs: dict) -> dict:
    """{file: tensors} of a saved training."""
    folder = base / "output" / outputs["save"]["text"][0].split(":")[0]
    return {path.name: load_file(path) for path in folder.iterdir()}


def test_each_client_s_results_are_those_that_it_gets_alone(at_once, url, base):
    for client in STEPS:
        runs = {"train" if "train" in run["prompt"][2] else "sample": run["outputs"] for run in at_once[0][client]}
        # inputs that make no difference, but to ComfyUI's cache
        alone = {"train": comfy_client.run_graph(url, training(client, "alone")),
                 "sample": comfy_client.run_graph(url, sampling(client, "sd15"))}
        ours, expected = trained(base, runs["train"]), trained(base, alone["train"])
        assert ours.keys() == expected.keys() == {"controlnet.safetensors"}
        assert all(tensor.equal(expected[file][key]) for file in ours for key, tensor in ours[file].items())
        assert runs["train"]["save"] != alone["train"]["save"]
        pixels, expected = (Image.open(demo.image_path(base, shown["save"])).tobytes()
                            for shown in (runs["sample"], alone["sample"]))
        assert pixels == expected


def test_they_run_one_after_the_other(at_once):
    times = sorted(tuple(data["timestamp"] for _, data in (run["status"]["messages"][0], run["status"]["messages"][-1]))
                   for runs in at_once[0].values() for run in runs)
    assert len(times) == 5
    assert all(end <= start for (_, end), (start, _) in zip(times, times[1:], strict=False))


def test_a_client_hears_of_its_own_runs_alone(at_once):
    histories, heard = at_once
    for client, messages in heard.items():
        events = [json.loads(message.data) for message in messages if message.type is aiohttp.WSMsgType.TEXT]
        own = {run["prompt"][1] for run in histories[client]}
        assert {event["data"]["prompt_id"] for event in events if event["type"] == "executing"} == own
        texts = " ".join(event["data"]["text"] for event in events if event["type"] == "controlnext_text")
        assert [steps for steps in (1, 2, 3) if f"step 1 of {steps}, loss" in texts] == [STEPS[client]]
