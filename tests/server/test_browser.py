"""The pack in ComfyUI's real frontend, in Chromium, against the real server."""

import json
import shutil
import urllib.request

import comfy_client
import demo
import environment
import pytest
import stand_in
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the Python package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="the browser tests need Chromium on PATH")]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
WORKFLOWS = sorted((environment.REPOSITORY / "example_workflows").glob("*.json"))
SEARCHES = {  # what people type: the node
    "canny control": "ControlNeXtCanny", "pose video": "ControlNeXtApply", "apply controlnet": "ControlNeXtApply",
    "load controlnext": "ControlNeXtLoader", "unet weights": "ControlNeXtUNetLoader",
    "export lora": "ControlNeXtSaveAsLoRA", "align pose": "ControlNeXtAlignPose", "skeleton": "ControlNeXtDrawPose",
}
READY = "() => !!(window.app?.graph && window.LiteGraph?.registered_node_types.ControlNeXtApply)"
GRAPH = "() => app.graph.serialize()"


@pytest.fixture(scope="module")
def open_page(url, tmp_path_factory):
    """open_page(locale): ComfyUI in a window of its own; pictures of all windows at the end are kept by pytest."""
    pages = []
    with playwright.sync_playwright() as run:  # ended with this module: other tests run event loops of their own
        browser = run.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def open_page(locale: str):
            settings = {"Comfy.TutorialCompleted": True, "Comfy.Locale": locale, "Comfy.VueNodes.Enabled": False}
            post = urllib.request.Request(f"{url}/settings", json.dumps(settings).encode(),
                                          {"Content-Type": "application/json"})
            comfy_client.open_url(post).close()
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.goto(url)
            page.wait_for_function(READY, timeout=60_000)
            page.wait_for_timeout(3000)  # the frontend opens its last or default workflow
            pages.append(page)
            return page
        yield open_page
        for index, page in enumerate(pages):
            page.screenshot(path=tmp_path_factory.mktemp("screenshots") / f"{index}.png")


@pytest.fixture(scope="module")
def page(open_page):
    return open_page("en")


@pytest.fixture
def main_job(base) -> dict:
    Image.radial_gradient("L").resize((128, 96)).convert("RGB").save(base / "input" / "browser.png")
    return demo.main_job(stand_in.CHECKPOINT, stand_in.CONTROLNEXT, "browser.png", size=(128, 96), steps=1)


def show_node(page, node: str) -> None:
    """One node alone on the canvas, clicked on."""
    page.evaluate("""type => {
        app.graph.clear()
        const node = LiteGraph.createNode(type)
        node.pos = [300, 200]
        app.graph.add(node)
        app.canvas.ds.scale = 1
        app.canvas.ds.offset = [0, 0]
    }""", node)
    page.wait_for_timeout(300)
    page.mouse.click(420, 218)


def ran(page, node: str) -> dict:
    """What a node shows after Run was pressed."""
    page.evaluate("() => { app.nodeOutputs = {} }")
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("node => app.nodeOutputs[node]?.images", arg=node, timeout=60_000)
    return page.evaluate("() => app.nodeOutputs")


@pytest.mark.parametrize("words", SEARCHES)
def test_the_node_search_finds(page, words):
    page.evaluate("() => { app.canvas.deselectAll(); app.graph.clear() }")
    page.wait_for_timeout(500)  # a click on what is just vanishing opens nothing
    page.mouse.dblclick(1000, 600)
    search = page.get_by_role("combobox", name="Add a node...")
    search.fill(words, timeout=10_000)
    title = page.evaluate("type => LiteGraph.registered_node_types[type].title", SEARCHES[words])
    page.get_by_role("option").filter(has_text=title).first.click(timeout=10_000)
    search.wait_for(state="hidden", timeout=10_000)
    page.mouse.click(1000, 600)  # puts the node down
    assert [node["type"] for node in page.evaluate(GRAPH)["nodes"]] == [SEARCHES[words]]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_an_example_opens_whole_and_is_saved_as_it_was(page, url, file):
    """Opened from where the template browser takes it: same nodes, links and values, and none is unknown."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    name = file.stem.replace(" ", "%20")
    page.evaluate("""async name => {
        const answer = await fetch(`/api/workflow_templates/ComfyUI-ControlNeXt/${name}.json`)
        await app.loadGraphData(await answer.json())
    }""", name)
    opened = page.evaluate(GRAPH)
    known = set(page.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
    assert {node["type"] for node in saved["nodes"]} <= known

    def nodes(graph: dict) -> dict:
        return {node["id"]: (node["type"], node.get("widgets_values") or [], node["properties"])
                for node in graph["nodes"]}
    assert nodes(opened) == nodes(saved)
    assert sorted(opened["links"]) == sorted(saved["links"])
    page.evaluate("async graph => app.loadGraphData(graph)", opened)
    again = page.evaluate(GRAPH)
    assert (nodes(again), again["links"]) == (nodes(opened), opened["links"])
    with comfy_client.open_url(f"{url}/api/workflow_templates/ComfyUI-ControlNeXt/{name}.jpg") as thumbnail:
        assert Image.open(thumbnail).size[0] > 400


def test_every_file_to_download_is_named_where_its_loader_asks_for_it():
    """The frontend offers a missing file of properties.models under the name that the loader's list must hold."""
    for file in WORKFLOWS:
        graph = json.loads(file.read_text(encoding="utf-8"))
        note = next(node for node in graph["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
        for node in graph["nodes"]:
            for model in node["properties"].get("models", []):
                assert model["name"] in node["widgets_values"], file.name
                assert model["url"] in note and f"models/{model['directory']}" in note, file.name


def test_a_run_shows_the_picture_and_the_chart_of_control(page, main_job):
    main_job["controlnext"]["inputs"]["variant"] = "sd15"  # a node that ran before would show nothing again
    page.evaluate("graph => app.loadApiJson(graph, 'main job')", main_job)
    page.wait_for_timeout(1000)
    outputs = ran(page, "save")
    assert outputs["controlnext"]["text"][0].startswith("sd15 for SD1.5, ")
    page.wait_for_function("""() => {
        return app.graph.nodes.find(node => node.type == 'ControlNeXtApply').imgs?.[0]?.naturalWidth == 384
    }""")
    values = page.evaluate("""() => {
        return app.graph.nodes.find(node => node.type == 'ControlNeXtLoader').widgets.map(widget => `${widget.value}`)
    }""")
    assert any("million parameters" in value for value in values)


def test_a_saved_picture_on_the_canvas_brings_its_workflow_back(page, main_job):
    page.evaluate("graph => app.loadApiJson(graph, 'main job')", main_job)
    page.wait_for_timeout(1000)
    image = ran(page, "save")["save"]["images"][0]
    before = sorted(node["type"] for node in page.evaluate(GRAPH)["nodes"])
    page.evaluate("() => app.graph.clear()")
    page.evaluate("""async image => {
        const answer = await fetch(`/view?filename=${image.filename}&subfolder=${image.subfolder}&type=output`)
        await app.handleFile(new File([await answer.blob()], image.filename, {type: 'image/png'}))
    }""", image)
    page.wait_for_function("count => app.graph.nodes.length == count", arg=len(before), timeout=20_000)
    assert sorted(node["type"] for node in page.evaluate(GRAPH)["nodes"]) == before


def test_a_wrong_file_is_our_sentence_in_the_page(page, main_job, full_controlnet):
    main_job["controlnext"]["inputs"]["controlnext_name"] = full_controlnet.name
    page.evaluate("() => app.refreshComboInNodes()")
    page.evaluate("graph => app.loadApiJson(graph, 'wrong file')", main_job)
    page.wait_for_timeout(1000)
    page.get_by_test_id("queue-button").click()
    details = page.get_by_role("button", name="View details")
    details.first.click(timeout=60_000)
    page.get_by_text(f"{full_controlnet.name} is not a ControlNeXt model: it is a full ControlNet").first.wait_for(
        timeout=10_000)


@pytest.mark.parametrize("locale, title, sentence", [
    ("en", "Apply ControlNeXt", "Makes a MODEL follow a control image. Put it between"),
    ("zh", "应用 ControlNeXt", "把它放在模型"),
])
def test_the_help_panel_shows_the_page_in_the_users_language(open_page, locale, title, sentence):
    page = open_page(locale)
    show_node(page, "ControlNeXtApply")
    page.get_by_test_id("info-button").click(timeout=10_000)
    page.get_by_text(sentence).first.wait_for(timeout=10_000)
    assert page.evaluate("() => app.graph.nodes[0].title") == title
