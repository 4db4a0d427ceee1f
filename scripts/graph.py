"""From a workflow file to what the frontend's Run button sends: the graph in API format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

NOTES = {"Note", "MarkdownNote"}
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"  # of the frontend alone, no server knows them
MUTED, BYPASSED = 2, 4  # modes


def load_prompt(content: dict, inputs_of: Callable[[str], Mapping]) -> dict[str, dict]:
    """The graph of a file's content, which is in API format already or as the frontend saves it.

    Raises:
        ValueError: it is neither, or a workflow with what only the frontend can take apart.
    """
    if isinstance(content, dict) and "nodes" in content and "links" in content:
        return to_prompt(content, inputs_of)
    if isinstance(content, dict) and content and all(isinstance(node, dict) and "class_type" in node
                                                     for node in content.values()):
        return content
    raise ValueError("the file holds no workflow; save one with Workflow > Save, or Workflow > Export (API).")


def to_prompt(workflow: dict, inputs_of: Callable[[str], Mapping]) -> dict[str, dict]:
    """{node id: {"class_type", "inputs"}} of a workflow (format 0.4, without subgraphs).

    Muted nodes are left out, bypassed ones and reroutes passed through, primitives put in as values.

    Args:
        workflow: the file's content, with each widget among its node's inputs, as frontends of 2025 and later save it.
        inputs_of: what a node of a type takes: its ``INPUT_TYPES()``.

    Raises:
        KeyError: there is no such node.
        ValueError: a node is a subgraph.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"] if link}
    subgraphs = {one["id"] for one in (workflow.get("definitions") or {}).get("subgraphs", ())}

    def source(link: int | None):
        """What an input gets over a link: [node id, slot] or a value; None for nothing."""
        while link is not None:
            node, slot = nodes[links[link][0]], links[link][1]
            if node["type"] == PRIMITIVE:
                return node["widgets_values"][0]
            if node.get("mode") == MUTED:
                return None
            if node["type"] != REROUTE and node.get("mode") != BYPASSED:
                return [str(node["id"]), slot]
            link = _passed_through(node, slot)
        return None

    prompt = {}
    for node in nodes.values():
        if node["type"] in (*NOTES, REROUTE, PRIMITIVE) or node.get("mode") in (MUTED, BYPASSED):
            continue
        if node["type"] in subgraphs:
            raise ValueError("the workflow holds a subgraph, which only ComfyUI's page can take apart; unpack it, or "
                             "save the workflow with Workflow > Export (API).")
        values = _widgets(node, inputs_of(node["type"]))
        linked = {entry["name"]: source(entry["link"]) for entry in node["inputs"] if entry["link"] is not None}
        given = {name: value for name, value in linked.items() if value is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values | given}
    return prompt


def _passed_through(node: dict, slot: int) -> int | None:
    """The link of the input that an output of a bypassed node stands for: the first one of its type."""
    kind = node["outputs"][slot]["type"]
    return next((entry["link"] for entry in node["inputs"]
                 if entry["type"] in (kind, "*") or kind == "*" and entry["link"] is not None), None)


def _widgets(node: dict, described: Mapping) -> dict:
    """{input: value} of what is set on a node."""
    described = {**described.get("required", {}), **described.get("optional", {})}
    values, found = iter(node.get("widgets_values") or []), {}
    for entry in node["inputs"]:
        name = entry["name"]
        if "widget" not in entry:
            continue
        value = next(values, None)  # Compare Images saves none for its view
        if name in described:  # the upload button is not
            found[name] = value
            if len(described[name]) > 1 and described[name][1].get("control_after_generate"):
                next(values)
    return found
