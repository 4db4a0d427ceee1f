"""What nodes say on themselves stays there (test_oldest_frontend.py and test_newest_frontend.py have it, too)."""

import json
import urllib.request

import browser
import comfy_client
import environment
import pytest
import stand_in
import training_graph

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


def reload(page, node: str, text: str) -> str:
    """What the node says when the page has come back with its workflow."""
    page.wait_for_function("text => Object.values(localStorage).some(kept => kept.includes(text))", arg=text[:20])
    page.reload()
    browser.wait_until_ready(page)
    return wait_for_text(page, node, text[:20])


def test_what_was_loaded_stays_on_the_node_when_the_job_ends_and_when_the_page_is_reloaded(url, page, nodes2):
    post(f"{url}/free", {"free_memory": True})  # or the node would not run again
    run(page, {
        "load": LOAD,
        "end": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}}})
    wait_for_text(page, "load", LOADED)
    page.wait_for_function(IDLE)
    page.wait_for_timeout(1000)
    assert wait_for_text(page, "load", LOADED) == LOADED
    assert reload(page, "load", LOADED) == LOADED


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


def test_an_interrupted_training_leaves_on_the_node_where_to_go_on_from(url, page, pictures):
    run(page, training_graph.graph(steps=1000, preview_every=0, filename_prefix="text"))
    wait_for_text(page, "train", "step 10 of 1000")
    post(f"{url}/interrupt", {})
    wait_for_text(page, "train", "stopped after step")
    page.wait_for_function(IDLE)
    page.wait_for_timeout(1000)
    text = wait_for_text(page, "train", "stopped after step")
    assert "choose text_" in text and "in resume_from" in text
    assert reload(page, "train", text) == text
