"""What nodes say on themselves stays there (test_oldest_frontend.py and test_newest_frontend.py have it, too)."""

import json
import urllib.request

import browser
import comfy_client
import environment
import pytest
import stand_in
import training_graph
from frontends import SWITCH_FACE

pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not environment.chromium(), reason=environment.NO_CHROMIUM)]

LOAD = {"class_type": "ControlNeXtLoader",
        "inputs": {"controlnext_name": stand_in.CONTROLNEXT, "variant": "sd15"}}
LOADED = "sd15 for SD1.5, 3.53 million parameters, float16"
READ = """id => {  // the text on a node where it is seen in full
    const element = app.graph.getNodeById(id)?.widgets?.find(widget => widget.name == 'controlnext_text')?.element
    return element?.offsetHeight && element.scrollHeight <= element.clientHeight ? element.innerText : ''
}"""
SHOW = "id => { app.canvas.ds.scale = 1; app.canvas.centerOnNode(app.graph.getNodeById(id)) }"
FAILED = """async () => {
    const [last] = Object.values(await (await fetch('/history?max_items=1')).json())
    return last?.status.status_str == 'error'
}"""
IDLE = """async () => {
    const {queue_running, queue_pending} = await (await fetch('/queue')).json()
    return !queue_running.length && !queue_pending.length
}"""


def post(url: str, data: dict) -> None:
    comfy_client.open_url(urllib.request.Request(url, json.dumps(data).encode())).close()


def run(page, graph: dict) -> None:
    page.evaluate("graph => app.loadApiJson(graph, 'text')", graph)
    page.wait_for_timeout(1000)
    page.get_by_test_id("queue-button").click()


def wait_for_text(page, node: str, words: str) -> str:
    page.evaluate(SHOW, node)
    page.wait_for_function(f"([id, words]) => ({READ})(id).includes(words)", arg=[node, words])
    return page.evaluate(READ, node)


def test_what_was_loaded_stays_on_the_node_when_the_job_ends(url, page, nodes2):
    post(f"{url}/free", {"free_memory": True})  # or the node would not run again
    run(page, {
        "load": LOAD,
        "end": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}}})
    wait_for_text(page, "load", LOADED)
    page.wait_for_function(IDLE)
    page.wait_for_timeout(1000)
    assert wait_for_text(page, "load", LOADED) == LOADED


def test_what_was_loaded_stays_on_the_node_when_another_node_fails(url, page):
    post(f"{url}/free", {"free_memory": True})
    run(page, {
        "load": LOAD,
        "fail": {"class_type": "ControlNeXtSave",
                 "inputs": {"controlnext": ["load", 0], "filename_prefix": "../outside"}}})
    page.wait_for_function(FAILED)
    page.wait_for_timeout(1000)
    assert wait_for_text(page, "load", LOADED) == LOADED
    page.keyboard.press("Escape")  # older frontends tell it in a dialog


def test_an_interrupted_training_leaves_on_the_node_where_to_go_on_from_and_reloading_the_page_keeps_all_texts(
        url, page, pictures):
    post(f"{url}/free", {"free_memory": True})
    training = training_graph.graph(steps=300, preview_every=0, filename_prefix="text")
    training["train"]["inputs"]["controlnext"] = ["load", 0]
    run(page, training | {"load": LOAD})
    wait_for_text(page, "train", "of 300")
    post(f"{url}/interrupt", {})
    wait_for_text(page, "train", "stopped after step")
    page.wait_for_function(IDLE)
    page.wait_for_timeout(1000)
    texts = {"train": wait_for_text(page, "train", "stopped after step"), "load": LOADED}
    assert "choose text_" in texts["train"] and "in resume_from" in texts["train"]

    for text in texts.values():
        page.wait_for_function("text => Object.values(localStorage).some(kept => kept.includes(text))", arg=text[:20])
    page.reload()
    browser.wait_until_ready(page)
    for nodes2 in (False, True):
        page.evaluate(SWITCH_FACE, nodes2)
        for node, text in texts.items():
            assert wait_for_text(page, node, text[:20]) == text
