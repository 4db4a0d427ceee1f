"""Names and choices in sentences."""

from controlnext_core.sentences import either, listed


def test_names_are_listed_as_people_list_them():
    assert listed(["SD1.5", "SDXL", "SVD"]) == "SD1.5, SDXL and SVD"


def test_choices_are_named_once_and_of_many_the_first_ones():
    assert either(["a", "b", "a"]) == "a or b"
    assert either("abcdef") == "a, b, c, d, e or another"
