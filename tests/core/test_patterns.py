"""Regular expressions of weights' names: Python's own, with those refused that could be tried for long."""

import re
import time

import pytest

from controlnext_core.bases import BASES
from controlnext_core.patterns import matching


@pytest.fixture(scope="module")
def names(goldens) -> list[str]:
    """The 2000 names of SDXL's and SVD's UNets."""
    return [*goldens.unet_shapes["sdxl"], *goldens.unet_shapes["svd"]]


@pytest.mark.parametrize("pattern", [
    *(base.unet_pattern for base in BASES.values()), ".", "$", "(?!)",
    r"down_blocks.*attn2.*to_out.*weight", r".*(attn1|attn2).*to_(q|k|v|out).*\.(weight|bias)$",
    "attn1.*to_q.*weight|attn2.*to_k.*weight|ff.*net.*", r"^(?!.*norm)(?=.*attn)(?!.*bias).*to_out.*weight",
    r"(?<!\.)norm\d+", "(?i)ATTN", r"(?:\.\d){1,3}", "(down|up|mid)_blocks?", r"(?:\.[a-z]+_?)?\.\d", "t{1000000000}",
])
def test_names_are_found_as_python_finds_them(names, pattern):
    assert matching(names, pattern) == [name for name in names if re.search(pattern, name)]


@pytest.mark.parametrize("pattern", [
    "([a-z_0-9.]+)+!", "(a|a)*b", "(a|a|.)*!", "(?i)(?:a.|A.)*!", "(?:.|..)+!", r"(?:\.\d+)*!", "(?:..?){30}!",
    "(a?){30}a{30}", "(?:ab?){30}!", ".?" * 40 + "!", ".?" * 17 + r"\B" * 80, "(?:a|a)" * 28, "(?:|a)" * 33,
    "(.*)(.*)(.*)(.*)!", ".*?.*?.*?.*?!", "(?:.*.*.*.*|x)!", "(?=.*.*.*.*!)", "(?!.*.*.*.*!)", ".{0,60}" * 4 + "!",
    "(){1000000000}", "(?:(?:(?:){999}){999}){999}", r"(?:\b)*!", r"(.*)\1!", "(x)?(?(1)a|b)", "." * 201,
    "*", "(", "[", "a{99999999999}", "(" * 5000, "*" * 5000, "(?<=a*)b", "*\n", "(?P<" + "x" * 150 + ">.)(?P=y\n)",
])
def test_what_is_no_pattern_or_can_be_tried_for_long_is_a_short_error_at_once(names, pattern):
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"cannot be used as a regular expression \(.+\)$") as raised:
        matching(names, pattern)
    assert time.thread_time() - start < 0.1
    assert len(str(raised.value)) < 300
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("pattern", [
    "[a-z_0-9.]+!", ".*.*.*!", "(.*?)(.*?)(.*?)[!?]", ".{1,3}" * 8 + "!", ".?" * 16 + "!",
    "[^!]*(?!.*!)(?:.{1,2}.)?(?i:.*)(.?)(?:.{1,2}.)?(?<=.).?(?<=.)(?=.).{0,9}?!",
    "(?i)" + "[\x00-\U0010ffff]" * 39 + "!",
])
def test_the_names_of_a_model_take_two_seconds_at_most(names, pattern):
    start = time.thread_time()
    try:
        assert matching(names, pattern) == []
    except ValueError as error:
        assert str(error).endswith("(it takes too long with so many of * and +)")
    assert time.thread_time() - start < 2
