"""Sentences that a node shows on itself in the open page."""

from server import PromptServer


def send_text(node_id: str | None, text: str) -> None:
    """Show a text on the node in the page that queued it, in place of the one before; None is no node of a prompt.

    The page's part is web/shown_on_nodes.js.
    """
    server = getattr(PromptServer, "instance", None)  # None where ComfyUI is used as a library
    if node_id is not None and server is not None and server.client_id is not None:  # else every page were told
        server.send_sync("controlnext_text", {"node": node_id, "text": text}, server.client_id)
