"""Control on the conditionings, by ComfyUI's own Apply ControlNet."""


def through_apply_controlnet(graph: dict, inject_at: str = "auto") -> dict:
    """The main job's API graph (demo.main_job) with Apply ControlNet in the place of Apply ControlNeXt."""
    graph = {name: {**node, "inputs": dict(node["inputs"])} for name, node in graph.items()}
    settings = graph.pop("apply")["inputs"]
    graph["control_net"] = {"class_type": "ControlNeXtToControlNet", "inputs": {
        "controlnext": settings["controlnext"], "inject_at": inject_at}}
    graph["apply_controlnet"] = {"class_type": "ControlNetApplyAdvanced", "inputs": {
        "positive": ["positive", 0], "negative": ["negative", 0], "control_net": ["control_net", 0],
        **{name: settings[name] for name in ("image", "strength", "start_percent", "end_percent")}}}
    graph["sample"]["inputs"] |= {"model": settings["model"], "positive": ["apply_controlnet", 0],
                                  "negative": ["apply_controlnet", 1]}
    return graph
