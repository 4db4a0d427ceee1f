"""ComfyUI's frontend in a Chromium, driven by Playwright."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import comfy_client
import environment

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

PICTURES = environment.cache_folder() / "screenshots"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.VueNodes.Enabled": False,
            "Comfy.Validation.Workflows": True, "Comfy.RightSidePanel.IsOpen": False,
            "LiteGraph.Canvas.MinFontSizeForLOD": 0}  # texts at any zoom

# Nothing moves for longer than an instant, since a page without a GPU spends a third of its time on that.
STILL = """addEventListener('DOMContentLoaded', () => document.head.appendChild(document.createElement('style'))
    .textContent = `*, *::before, *::after {
        animation-duration: 1ms !important; animation-iteration-count: 1 !important; transition-duration: 1ms !important
    }`)"""


def options(frontend: str) -> tuple[str, str]:
    """What ComfyUI has to be started with so that it serves this version of its frontend instead of its own."""
    return "--front-end-root", str(environment.frontend(frontend, Path(sys.executable)))


def launch(playwright: Playwright) -> Browser:
    """A browser without a window."""
    return playwright.chromium.launch(executable_path=environment.chromium(), args=FLAGS)


def open_page(browser: Browser, url: str, settings: dict) -> Page:
    """A page with the frontend of the server at `url`, ready for use; `settings` are the user's, beside SETTINGS."""
    post = urllib.request.Request(f"{url}/settings", json.dumps(SETTINGS | settings).encode(),
                                  {"Content-Type": "application/json"})
    comfy_client.open_url(post).close()
    page = browser.new_page(viewport={"width": 1600, "height": 1000}, reduced_motion="reduce")
    page.add_init_script(STILL)
    page.set_default_timeout(60_000)  # milliseconds of each wait, since the machine may be busy
    page.goto(url)
    wait_until_ready(page)
    return page


def wait_until_ready(page: Page) -> None:
    """Wait until the pack's nodes are there and a workflow, the last or the default one, is open."""
    page.wait_for_function("() => !!(window.app?.graph && window.LiteGraph?.registered_node_types.ControlNeXtApply)")
    page.wait_for_function("() => app.extensionManager.workflow.activeWorkflow && app.graph.nodes.length")
    page.wait_for_timeout(1000)
