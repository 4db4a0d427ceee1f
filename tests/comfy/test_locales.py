"""The languages of the nodes: English says what the nodes say, every other language all that English says."""

import json
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
LOCALES = REPO / "locales"
SPECIAL = set("@{}|$")  # the frontend's message format reads these


def read(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def texts(entry: dict, path: tuple = ()) -> dict[tuple, str]:
    """{path of keys: text} of a nested dictionary."""
    found = {}
    for key, value in entry.items():
        found |= texts(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def described(schema) -> dict:
    """What the nodes say themselves, in the layout of nodeDefs.json."""
    entry = {"display_name": schema.display_name, "description": schema.description,
             "inputs": {one.id: {"name": one.id, "tooltip": one.tooltip} for one in schema.inputs}}
    if schema.outputs:
        entry["outputs"] = {str(index): {"name": one.display_name or one.id, "tooltip": one.tooltip}
                            for index, one in enumerate(schema.outputs)}
    return entry


@pytest.fixture(scope="module")
def ours(pack) -> dict:
    """{node id: schema} of the pack's nodes."""
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in pack("nodes").NODES}


def test_english_is_what_the_nodes_say(ours):
    assert texts(read("en")) == texts({name: described(schema) for name, schema in ours.items()})


def test_chinese_says_all_that_english_says():
    chinese = texts(read("zh"))
    assert chinese.keys() == texts(read("en")).keys()
    assert all(chinese.values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_holds_what_the_frontend_would_read_as_a_command(language):
    assert not {path: text for path, text in texts(read(language)).items() if SPECIAL & set(text)}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_has_a_help_page_that_names_all_its_inputs(ours, language):
    for name, schema in ours.items():
        page = (REPO / "web" / "docs" / name / f"{language}.md").read_text(encoding="utf-8")
        assert page.startswith("# ")
        assert not {one.id for one in schema.inputs if one.id not in page}, name


def test_the_chinese_help_page_is_titled_as_the_node():
    for name, node in read("zh").items():
        page = (REPO / "web" / "docs" / name / "zh.md").read_text(encoding="utf-8")
        assert page.splitlines()[0] == f"# {node['display_name']}"


def test_every_help_page_has_a_picture_and_the_same_parts_in_both_languages(ours):
    for name in ours:
        folder = REPO / "web" / "docs" / name
        english, chinese = ((folder / f"{language}.md").read_text(encoding="utf-8") for language in ("en", "zh"))
        for part in ("Inputs", "What to download", "Common mistakes"):
            assert f"\n## {part}\n" in english, name
        assert english.count("\n## ") == chinese.count("\n## "), name
        assert f"]({name}/picture.jpg)" in english and f"]({name}/picture.jpg)" in chinese, name
        assert (folder / "picture.jpg").is_file(), name
