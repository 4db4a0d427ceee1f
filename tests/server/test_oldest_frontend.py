"""What nodes say on themselves, in the oldest frontend that is supported."""

import environment
from frontends import served
from test_text_on_nodes import (  # noqa: F401
    pytestmark,
    test_an_interrupted_training_leaves_on_the_node_where_to_go_on_from_and_reloading_the_page_keeps_all_texts,
    test_what_was_loaded_stays_on_the_node_when_another_node_fails,
    test_what_was_loaded_stays_on_the_node_when_the_job_ends,
)

url = served(environment.OLDEST_FRONTEND)
