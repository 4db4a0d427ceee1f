"""From a workflow file to what the frontend's Run button sends: the graph in API format."""

NOTES = {"Note", "MarkdownNote"}


def to_prompt(workflow: dict, object_info: dict) -> dict[str, dict]:
    """{node id: {"class_type", "inputs"}} of a workflow (format 0.4, nothing muted or bypassed, no subgraphs).

    Args:
        workflow: the file's content, with each widget among its node's inputs, as frontends of 2025 and later save it.
        object_info: what the server's /object_info answers.

    Raises:
        KeyError: the server has no such node.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        described = object_info[node["type"]]["input"]
        described = {**described.get("required", {}), **described.get("optional", {})}
        values, inputs = iter(node.get("widgets_values") or []), {}
        for entry in node["inputs"]:
            name = entry["name"]
            if "widget" in entry:
                value = next(values, None)  # Compare Images saves none for its view
                if name in described:  # the upload button is not
                    inputs[name] = value
                    if len(described[name]) > 1 and described[name][1].get("control_after_generate"):
                        next(values)
            if entry["link"] is not None:
                inputs[name] = sources[entry["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
