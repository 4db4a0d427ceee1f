"""The pack in the newest frontend, which ComfyUI comes to serve: what of test_browser.py frontends may change."""

import browser
import comfy_client
import environment
import pytest
from test_browser import (  # noqa: F401
    pytestmark,
    test_a_blueprint_is_listed_and_comes_as_the_example_in_one_node,
    test_a_graph_built_by_dragging_links_runs_and_shows_picture_chart_and_what_was_loaded,
    test_a_wrong_file_is_our_sentence_in_the_page,
    test_an_example_opens_whole_from_the_server_and_is_saved_as_it_was,
    test_no_node_of_an_example_or_a_blueprint_lies_over_another,
    test_the_frontend_tells_a_file_that_its_schema_forbids,
    test_the_help_panel_shows_every_nodes_page_and_picture_in_the_users_language,
)


@pytest.fixture(scope="module")
def url(comfyui, base):
    newest = browser.options(environment.NEWEST_FRONTEND)
    with comfy_client.running_server(comfyui, base, options=("--cpu", *newest)) as url:
        yield url
