"""The pack in ComfyUI's real frontend, in Chromium, against the real server."""

import contextlib
import itertools
import json
import re

import browser
import comfy_client
import demo
import environment
import pytest
from apply_controlnet import through_apply_controlnet
from PIL import Image, ImageChops

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need the Python package playwright")
pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not environment.chromium(), reason=environment.NO_CHROMIUM)]

WORKFLOWS = sorted((environment.REPOSITORY / "example_workflows").glob("*.json"))
BLUEPRINTS = {  # the example that each is, as one node
    "ControlNeXt Canny to Image": "SDXL Canny", "ControlNeXt Pose to Video": "SVD Long Pose Video",
}
OUTSIDE_A_BLUEPRINT = {"LoadImage", "LoadVideo", "SaveImage", "SaveVideo", "PreviewImage"}
SEARCHES = {  # what people type: the node
    "controlnet": "ControlNeXtApply", "canny control": "ControlNeXtCanny", "pose video": "ControlNeXtApply",
    "load controlnext": "ControlNeXtLoader", "unet weights": "ControlNeXtUNetLoader",
    "export lora": "ControlNeXtSaveAsLoRA", "align pose": "ControlNeXtAlignPose", "skeleton": "ControlNeXtDrawPose",
    "train controlnet": "ControlNeXtTrain", "export controlnext": "ControlNeXtSave", "edges": "ControlNeXtCanny",
    "lineart": "ControlNeXtCanny", "openpose": "ControlNeXtDrawPose", "dwpose": "ControlNeXtAlignPose",
    "upscale": "ControlNeXtToControlNet",
}
# As a file has it: what is undefined is not there, while Playwright makes a null of it.
GRAPH = "() => JSON.parse(JSON.stringify(app.graph.serialize()))"
# Into the tab that is open, for the frontend gets slower with every further one.
LOAD = "async graph => app.loadGraphData(graph, true, true, app.extensionManager.workflow.activeWorkflow)"
# What the frontend says of a workflow that does not fit its schema or whose links do not agree with each other.
MISFIT = re.compile("Invalid workflow against zod schema|Workflow Validation|Workflow Links Fixed")
PROMPT = "async () => (await app.graphToPrompt()).output"
# In a tab of its own, since in Nodes 2.0 the newest frontend keeps sizes of the nodes of the same ids in a tab.
OPEN = """async graph => {
    app.canvas.setGraph(app.rootGraph)
    await app.loadGraphData(graph)
    const blueprint = app.graph.nodes.find(node => node.subgraph)
    if (blueprint) app.canvas.openSubgraph(blueprint.subgraph, blueprint)
}"""
RECTANGLES = """async nodes2 => {  // when they have rested for five frames
    const measure = node => {
        if (!nodes2) return [...node.boundingRect]
        const box = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
        return box && [box.left, box.top, box.width, box.height].map(length => length / app.canvas.ds.scale)
    }
    let found, rested = 0
    while (rested < 5) {
        const before = JSON.stringify(found)
        await new Promise(requestAnimationFrame)
        found = app.canvas.graph.nodes.map(node => [`${node.title} ${node.id}`, measure(node)])
        rested = JSON.stringify(found) == before ? rested + 1 : 0
    }
    return found
}"""


def search(page, words: str):
    """The node search, opened on an empty canvas, after typing `words`."""
    page.evaluate("() => { app.canvas.deselectAll(); app.graph.clear() }")
    box = page.get_by_role("combobox", name="Add a node...")
    for _ in range(5):  # on a busy machine two clicks may be too far apart
        page.wait_for_timeout(500)  # a click on what is just vanishing opens nothing
        page.mouse.dblclick(1000, 600)
        with contextlib.suppress(playwright.TimeoutError):
            box.wait_for(timeout=3000)
            break
    box.fill(words)
    return box


def add_first(page, box, title: str) -> None:
    """Choose the first node of this title in the search and put it down."""
    page.get_by_role("option").filter(has_text=title).first.click()
    box.wait_for(state="hidden")
    page.mouse.click(1000, 600)
    page.wait_for_function("() => app.graph.nodes.length == 1")


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


def nodes_by_id(graph: dict) -> dict:
    return {node["id"]: (node["type"], node.get("widgets_values") or [], node["properties"]) for node in graph["nodes"]}


def ran(page, node: str) -> dict:
    """What the nodes show after Run was pressed and `node` showed a picture."""
    page.evaluate("() => { app.nodeOutputs = {} }")
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("node => app.nodeOutputs[node]?.images", arg=node)
    return page.evaluate("() => app.nodeOutputs")


def connections(prompt: dict) -> list:
    """Each node of an API graph that a blueprint holds: its type and what feeds its inputs, whatever the ids."""
    kept = {name: node for name, node in prompt.items() if node["class_type"] not in OUTSIDE_A_BLUEPRINT}
    return sorted((node["class_type"], sorted(
        (name, kept[value[0]]["class_type"], value[1]) for name, value in node["inputs"].items()
        if isinstance(value, list) and value[0] in kept)) for node in kept.values())


def of_other_packs(graph: dict) -> dict[str, str]:
    """{node type: its pack} of the nodes that neither ComfyUI nor this pack has."""
    packs = {node["type"]: node["properties"].get("cnr_id", "comfy-core") for node in graph["nodes"]}
    return {kind: pack for kind, pack in packs.items() if pack not in ("comfy-core", "controlnext")}


def overlapping(rectangles: list) -> list[str]:
    """The pairs of nodes that share some place, from [name, [left, top, width, height]] of each."""
    return [f"{one} and {other}" for (one, a), (other, b) in itertools.combinations(rectangles, 2)
            if all(max(a[axis], b[axis]) < min(a[axis] + a[axis + 2], b[axis] + b[axis + 2]) for axis in (0, 1))]


@pytest.mark.parametrize("words", SEARCHES)
def test_the_node_search_finds(page, words):
    box = search(page, words)
    add_first(page, box, page.evaluate("type => LiteGraph.registered_node_types[type].title", SEARCHES[words]))
    assert [node["type"] for node in page.evaluate(GRAPH)["nodes"]] == [SEARCHES[words]]


def test_the_template_browser_lists_every_example_and_opens_the_one_clicked(page):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("template-workflows-content").wait_for()
    page.get_by_text("ComfyUI-ControlNeXt").first.click()
    for file in WORKFLOWS:
        page.get_by_test_id(f"template-workflow-{file.stem}").wait_for()
    clicked = WORKFLOWS[-1]
    is_open = "name => app.extensionManager.workflow.activeWorkflow?.filename.startsWith(name)"
    for _ in range(5):  # a click on what still scrolls into sight opens nothing
        with contextlib.suppress(playwright.TimeoutError):
            page.get_by_test_id(f"template-workflow-{clicked.stem}").click(timeout=5000)
            page.wait_for_function(is_open, arg=clicked.stem, timeout=5000)
            break
    page.wait_for_function(is_open, arg=clicked.stem)
    saved = json.loads(clicked.read_text(encoding="utf-8"))
    page.wait_for_function("count => app.graph.nodes.length == count", arg=len(saved["nodes"]))
    assert nodes_by_id(page.evaluate(GRAPH)) == nodes_by_id(saved)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_an_example_opens_whole_from_the_server_and_is_saved_as_it_was(page, url, file):
    """Same nodes, links and values as in the file, none unknown but another pack's, none over another; its thumbnail is
    there.
    """
    saved = json.loads(file.read_text(encoding="utf-8"))
    template = f"{url}/api/workflow_templates/ComfyUI-ControlNeXt/{file.stem.replace(' ', '%20')}"
    served = comfy_client.get_json(f"{template}.json")  # what the template browser opens
    assert served == saved
    page.evaluate(LOAD, served)
    opened = page.evaluate(GRAPH)
    page.wait_for_timeout(200)
    assert not page.get_by_text(MISFIT).count()
    assert not overlapping(page.evaluate(RECTANGLES, False))
    known = set(page.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
    assert {node["type"] for node in saved["nodes"]} - known == set(of_other_packs(saved))
    assert nodes_by_id(opened) == nodes_by_id(saved)
    assert sorted(opened["links"]) == sorted(saved["links"])
    page.evaluate(LOAD, opened)
    again = page.evaluate(GRAPH)
    assert (nodes_by_id(again), again["links"]) == (nodes_by_id(opened), opened["links"])
    with comfy_client.open_url(f"{template}.jpg") as picture:
        assert Image.open(picture).size[0] >= 400


def test_the_frontend_tells_a_file_that_its_schema_forbids(page):
    page.evaluate(LOAD, json.loads(WORKFLOWS[0].read_text(encoding="utf-8")) | {"floatingLinks": None})
    page.get_by_text(MISFIT).first.wait_for()
    page.reload()  # away with what it said
    browser.wait_until_ready(page)


def test_no_node_of_an_example_or_a_blueprint_lies_over_another(page, nodes2):
    """In the classic face the examples are looked at when each is opened."""
    found = []
    for file in [*(WORKFLOWS if nodes2 else ()), *(environment.REPOSITORY / "subgraphs").glob("*.json")]:
        page.evaluate(OPEN, json.loads(file.read_text(encoding="utf-8")))
        assert not page.get_by_text(MISFIT).count(), file.stem
        found += [f"{file.stem}: {pair}" for pair in overlapping(page.evaluate(RECTANGLES, nodes2))]
    page.evaluate("() => app.canvas.setGraph(app.rootGraph)")
    assert not found


@pytest.mark.parametrize("blueprint, example", BLUEPRINTS.items())
def test_a_blueprint_is_listed_and_comes_as_the_example_in_one_node(page, url, blueprint, example):
    listed = comfy_client.get_json(f"{url}/global_subgraphs").values()
    assert [entry["info"]["node_pack"] for entry in listed if entry["name"] == blueprint] == [
        "custom_nodes.ComfyUI-ControlNeXt"]
    saved = json.loads((environment.REPOSITORY / "example_workflows" / f"{example}.json").read_text(encoding="utf-8"))
    page.evaluate(LOAD, saved)
    expected = connections(page.evaluate(PROMPT))
    add_first(page, search(page, blueprint), blueprint)
    values = page.evaluate("() => app.graph.nodes[0].widgets.map(widget => widget.value)")
    assert len(values) >= 10 and None not in values
    assert connections(page.evaluate(PROMPT)) == expected
    known = set(page.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
    assert set(page.evaluate("() => app.graph.nodes[0].subgraph.nodes.map(node => node.type)")) <= known


def test_every_file_to_download_is_named_where_its_loader_asks_for_it():
    """The frontend offers a missing file of properties.models under the name that the loader's list must hold."""
    graphs = {file: json.loads(file.read_text(encoding="utf-8"))["nodes"] for file in WORKFLOWS}
    for file in (environment.REPOSITORY / "subgraphs").glob("*.json"):
        graphs[file] = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]["nodes"]
    for file, nodes in graphs.items():
        note = next(node for node in nodes if node["type"] == "MarkdownNote")["widgets_values"][0]
        for node in nodes:
            for model in node["properties"].get("models", []):
                assert model["name"] in node["widgets_values"], file.name
                assert model["url"] in note and f"models/{model['directory']}" in note, file.name


def test_every_note_has_the_same_title_and_a_blueprints_node_an_id_of_its_own():
    for file in [*WORKFLOWS, *(environment.REPOSITORY / "subgraphs").glob("*.json")]:
        graph = json.loads(file.read_text(encoding="utf-8"))
        inner = [node for part in graph.get("definitions", {}).get("subgraphs", []) for node in part["nodes"]]
        assert [node["title"] for node in graph["nodes"] + inner if node["type"] == "MarkdownNote"] == ["How to use"]
        assert not {node["id"] for node in graph["nodes"]} & {node["id"] for node in inner}, file.name


def test_a_pack_that_an_example_needs_is_named_and_linked_in_its_note():
    found = {}
    for file in WORKFLOWS:
        graph = json.loads(file.read_text(encoding="utf-8"))
        note = next(node for node in graph["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
        for kind, pack in of_other_packs(graph).items():
            assert f"**{kind}**" in note and re.search(rf"\(https://github\.com/\w+/{pack}\)", note, re.IGNORECASE)
            found[file.stem] = pack
    assert found == {"Tiled Upscale with Control": "comfyui_ultimatesdupscale"}


def build(page, graph: dict) -> dict[str, int]:
    """The nodes of an API graph on the empty canvas, and its links, each drawn with the mouse; {name: id}."""
    ids = page.evaluate("""graph => {
        app.graph.clear()
        app.canvas.ds.scale = 0.62
        app.canvas.ds.offset = [150, 180]
        return Object.fromEntries(Object.entries(graph).map(([name, {class_type, inputs}], index) => {
            const node = LiteGraph.createNode(class_type)
            node.pos = [index % 5 * 460, Math.floor(index / 5) * 500]
            app.graph.add(node)
            for (const widget of node.widgets ?? [])
                if (widget.name in inputs && !Array.isArray(inputs[widget.name])) widget.value = inputs[widget.name]
            return [name, node.id]
        }))
    }""", graph)
    page.wait_for_timeout(500)
    for name, node in graph.items():
        for input_name, source in node["inputs"].items():
            if isinstance(source, list):
                start, end = page.evaluate("""([from, slot, to, name]) => {
                    const [source, target] = [app.graph.getNodeById(from), app.graph.getNodeById(to)]
                    const input = target.inputs.findIndex(input => input.name == name)
                    return [source.getConnectionPos(false, slot), target.getConnectionPos(true, input)]
                        .map(position => [...app.canvas.ds.convertOffsetToCanvas(position)])
                }""", [ids[source[0]], source[1], ids[name], input_name])
                page.mouse.move(*start)
                page.mouse.down()
                page.mouse.move(*end, steps=4)
                page.mouse.up()
    return ids


def test_a_graph_built_by_dragging_links_runs_and_shows_picture_chart_and_what_was_loaded(page, main_job):
    main_job["controlnext"]["inputs"]["variant"] = "sd15"  # a node that ran before would show nothing again
    ids = build(page, main_job)
    built = page.evaluate(PROMPT)
    for name, node in main_job.items():
        found = built[str(ids[name])]["inputs"]
        assert {key: found.get(key) for key in node["inputs"]} == {
            key: [str(ids[value[0]]), value[1]] if isinstance(value, list) else value
            for key, value in node["inputs"].items()}, name
    outputs = ran(page, str(ids["save"]))
    assert outputs[str(ids["controlnext"])]["text"][0].startswith("sd15 for SD1.5, ")
    page.wait_for_function("id => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth == 128", arg=ids["save"])
    texts = "id => app.graph.getNodeById(id).widgets.at(-1).element.textContent"
    assert "million parameters" in page.evaluate(texts, ids["controlnext"])
    assert "strength over the sampling" in page.evaluate(texts, ids["apply"])


def test_comfyuis_own_apply_controlnet_linked_by_dragging_draws_the_same_picture(page, base, main_job):
    page.evaluate("graph => app.loadApiJson(graph, 'main job')", main_job)
    page.wait_for_timeout(1000)
    expected = ran(page, "save")["save"]
    save = str(build(page, through_apply_controlnet(main_job))["save"])
    one, other = (Image.open(demo.image_path(base, shown)) for shown in (expected, ran(page, save)[save]))
    assert one.size == (128, 96) and ImageChops.difference(one, other).getbbox() is None


def test_a_saved_workflow_is_the_same_after_reloading_the_page(page, url, main_job):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_timeout(500)
    build(page, main_job)
    before = page.evaluate(GRAPH)
    page.keyboard.press("Control+s")
    name = f"kept_{url.rpartition(':')[2]}"  # a name that another server's page has not used
    page.get_by_role("dialog").get_by_role("textbox").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_function("name => app.extensionManager.workflow.activeWorkflow?.filename == name", arg=name)
    page.wait_for_timeout(500)
    page.reload()
    browser.wait_until_ready(page)
    saved = comfy_client.get_json(f"{url}/api/userdata/workflows%2F{name}.json")
    page.evaluate(LOAD, saved)
    for after in (saved, page.evaluate(GRAPH)):
        assert nodes_by_id(after) == nodes_by_id(before)
        assert after["links"] == before["links"]


def test_a_saved_picture_dropped_on_the_canvas_brings_its_workflow_back(page, main_job):
    page.evaluate("graph => app.loadApiJson(graph, 'main job')", main_job)
    page.wait_for_timeout(1000)
    before = page.evaluate(GRAPH)  # the run changes the seed for the next one
    image = ran(page, "save")["save"]["images"][0]
    page.evaluate("() => app.graph.clear()")
    page.evaluate("""async image => {
        const answer = await fetch(`/view?filename=${image.filename}&subfolder=${image.subfolder}&type=output`)
        const dataTransfer = new DataTransfer()
        dataTransfer.items.add(new File([await answer.blob()], image.filename, {type: 'image/png'}))
        for (const kind of ['dragenter', 'dragover', 'drop'])
            app.canvas.canvas.dispatchEvent(new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true,
                                                                 clientX: 1000, clientY: 600}))
    }""", image)
    page.wait_for_function("count => app.graph.nodes.length == count", arg=len(before["nodes"]))
    after = page.evaluate(GRAPH)
    assert nodes_by_id(after) == nodes_by_id(before)
    assert sorted(after["links"]) == sorted(before["links"])


def test_a_wrong_file_is_our_sentence_in_the_page(page, main_job, full_controlnet):
    main_job["controlnext"]["inputs"]["controlnext_name"] = full_controlnet.name
    page.evaluate("() => app.refreshComboInNodes()")
    page.evaluate("graph => app.loadApiJson(graph, 'wrong file')", main_job)
    page.wait_for_timeout(1000)
    page.get_by_test_id("queue-button").click()
    page.get_by_role("button", name="View details").first.click()
    page.get_by_text(f"{full_controlnet.name} is not a ControlNeXt model: it is a full ControlNet").first.wait_for()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_help_panel_shows_every_nodes_page_and_picture_in_the_users_language(open_page, language):
    page = open_page(language)
    browser.PICTURES.mkdir(exist_ok=True)
    locale = environment.REPOSITORY / "locales" / language / "nodeDefs.json"
    for name, texts in json.loads(locale.read_text(encoding="utf-8")).items():
        show_node(page, name)
        page.get_by_test_id("info-button").click()
        page.get_by_role("heading", name=texts["display_name"], exact=True).first.wait_for()
        page.wait_for_function("""name => [...document.images].some(
            image => image.src.includes(`/docs/${name}/`) && image.naturalWidth > 0)""", arg=name)
        assert page.evaluate("() => app.graph.nodes[0].title") == texts["display_name"]
        page.screenshot(path=browser.PICTURES / f"help_{language}_{name}.png")
