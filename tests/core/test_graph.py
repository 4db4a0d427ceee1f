"""scripts/graph.py: from a workflow as ComfyUI's page saves it to the graph that a server gets."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "scripts"))
import graph  # noqa: E402

INPUTS = {
    "Load": {"required": {"name": (["a"], {})}},
    "Sample": {"required": {"model": ("MODEL",), "seed": ("INT", {"control_after_generate": True}),
                            "steps": ("INT", {})}, "optional": {"mask": ("MASK",)}},
    "Patch": {"required": {"model": ("MODEL",), "factor": ("FLOAT", {})}},
}


def node(number: int, kind: str, inputs=(), values=(), outputs=(), mode: int = 0) -> dict:
    """A node; inputs are (name, type, link or None, is a widget)."""
    entries = [{"name": name, "type": of, "link": link, **({"widget": {"name": name}} if widget else {})}
               for name, of, link, widget in inputs]
    return {"id": number, "type": kind, "mode": mode, "inputs": entries, "widgets_values": list(values),
            "outputs": [{"type": of} for of in outputs]}


def workflow(*nodes: dict, links=()) -> dict:
    return {"nodes": list(nodes), "links": [[*link, "*"] for link in links]}


LOAD = node(1, "Load", [("name", "COMBO", None, True)], ["a"], ["MODEL"])


def sample(link: int | None, seed_link: int | None = None) -> dict:
    return node(9, "Sample", [("model", "MODEL", link, False), ("mask", "MASK", None, False),
                              ("seed", "INT", seed_link, True), ("steps", "INT", None, True)], [5, "fixed", 20])


def prompt_of(content: dict) -> dict:
    return graph.load_prompt(content, INPUTS.__getitem__)


def test_widgets_and_links_become_inputs():
    assert prompt_of(workflow(LOAD, sample(1), node(3, "MarkdownNote", values=["text"]), links=[(1, 1, 0, 9, 0)])) == {
        "1": {"class_type": "Load", "inputs": {"name": "a"}},
        "9": {"class_type": "Sample", "inputs": {"model": ["1", 0], "seed": 5, "steps": 20}}}


def test_reroutes_and_bypassed_nodes_are_passed_through():
    reroute = node(2, "Reroute", [("", "*", 1, False)], outputs=["*"])
    inputs = [("factor", "FLOAT", None, True), ("model", "MODEL", 2, False)]
    bypassed = node(3, "Patch", inputs, [2.0], ["MODEL"], mode=4)
    found = prompt_of(workflow(LOAD, reroute, bypassed, sample(3),
                               links=[(1, 1, 0, 2, 0), (2, 2, 0, 3, 1), (3, 3, 0, 9, 0)]))
    assert found.keys() == {"1", "9"} and found["9"]["inputs"]["model"] == ["1", 0]


def test_muted_nodes_are_left_out_and_primitives_are_values():
    muted = node(2, "Patch", [("model", "MODEL", 1, False)], [2.0], ["MODEL"], mode=2)
    primitive = node(4, "PrimitiveNode", values=[77, "fixed"], outputs=["INT"])
    found = prompt_of(workflow(LOAD, muted, primitive, sample(2, 4),
                               links=[(1, 1, 0, 2, 0), (2, 2, 0, 9, 0), (4, 4, 0, 9, 2)]))
    assert found["9"]["inputs"] == {"seed": 77, "steps": 20}


def test_a_graph_in_api_format_is_taken_as_it_is():
    content = {"1": {"class_type": "Load", "inputs": {"name": "a"}}}
    assert prompt_of(content) == content


@pytest.mark.parametrize("content", [{}, [], {"a": 1}, "text", None])
def test_what_is_no_workflow_is_one_sentence(content):
    with pytest.raises(ValueError, match="^the file holds no workflow; save one with Workflow > Save"):
        prompt_of(content)


def test_a_subgraph_is_one_sentence():
    content = workflow(node(1, "inner")) | {"definitions": {"subgraphs": [{"id": "inner"}]}}
    with pytest.raises(ValueError, match="the workflow holds a subgraph"):
        prompt_of(content)
