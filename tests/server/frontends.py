"""The faces of a frontend, and another one than ComfyUI's own, for the tests of a whole file."""

import browser
import comfy_client
import pytest

SWITCH_FACE = "nodes2 => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', nodes2)"


def served(version: str):
    """The fixture ``url`` of a file whose server has this version of the frontend."""
    @pytest.fixture(scope="module")
    def url(comfyui, base):
        with comfy_client.running_server(comfyui, base, options=("--cpu", *browser.options(version))) as url:
            yield url
    return url
