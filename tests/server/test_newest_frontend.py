"""The pack in the newest frontend, which ComfyUI comes to serve: what frontends may change."""

import environment
from frontends import served
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
from test_text_on_nodes import (  # noqa: F401
    test_an_interrupted_training_leaves_on_the_node_where_to_go_on_from_and_reloading_the_page_keeps_all_texts,
    test_what_was_loaded_stays_on_the_node_when_another_node_fails,
    test_what_was_loaded_stays_on_the_node_when_the_job_ends,
)

url = served(environment.NEWEST_FRONTEND)
