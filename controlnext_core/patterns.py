"""Regular expressions from people, matched in bounded time: nothing can stop Python while it tries one."""

import re
import time
from collections.abc import Iterable

from .sentences import quoted

try:
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_parse as parser

LONGEST_PATTERN, LONGEST_NAME = 200, 80  # characters
# Backtracking tries an item anew for every way to match the items before it: ways multiply, steps add up. Unbounded
# repeats share a name's characters, so k of them match in some 32^k ways from an average start; a fourth one needs more
# than STEPS. These from each of 80 starts take 1 s, and after SECONDS no further name is tried.
WAYS, STEPS, SECONDS = 32, 2 ** 20, 0.5


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names, of up to 80 characters, that hold the regular expression ``pattern``.

    Raises:
        ValueError: it is no regular expression, refers back to a group, or can take long; says which.
    """
    try:
        return _search(names, _compiled(pattern))
    except ValueError as error:
        raise ValueError(f"{quoted(pattern)} cannot be used as a regular expression ({error})") from None


def _search(names: Iterable[str], pattern: re.Pattern) -> list[str]:
    found, start = [], time.thread_time()
    for name in names:
        if pattern.search(name):
            found.append(name)
        if time.thread_time() - start > SECONDS:
            raise ValueError("it takes too long with so many of * and +")
    return found


def _compiled(pattern: str) -> re.Pattern:
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST_PATTERN}")
    try:
        parsed, compiled = parser.parse(pattern), re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(quoted(error)) from None
    if _effort(parsed)[1] > STEPS:
        raise ValueError("it has more than three of * and +, one inside another, or too many other choices")
    return compiled


def _effort(items: Iterable[tuple]) -> tuple[int, int]:
    """(ways to match parsed items from one start, steps to try them all); what exceeds STEPS is not counted on."""
    ways, steps = 1, 0
    for kind, argument in items:
        more, each = _effort_of_item(str(kind), argument)
        ways, steps = min(ways * more, STEPS + 1), min(steps + ways * each, STEPS + 1)
    return ways, steps


def _effort_of_item(kind: str, argument) -> tuple[int, int]:
    match kind, argument:
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT" | "FAILURE", _:
            return 1, 1
        case "SUBPATTERN", (*_, body):
            return _effort(body)
        case "BRANCH", (_, bodies):
            ways, steps = zip(*map(_effort, bodies), strict=True)
            return (max if _exclude_each_other(bodies) else sum)(ways), len(bodies) + sum(steps)
        case ("ASSERT" | "ASSERT_NOT", (_, body)) | ("ATOMIC_GROUP", body):
            return 1, 1 + _effort(body)[1]  # once these match, no other way is tried
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT", (low, high, body):
            return _effort_of_repeat(low, high, body)
    raise ValueError("it refers back to a group")


def _effort_of_repeat(low: int, high: int, body) -> tuple[int, int]:
    if high > 1 and body.getwidth()[0] == 0:  # how often is then no matter of the name's length
        raise ValueError("it repeats what can be empty")
    low, high = min(low, LONGEST_NAME), min(high, LONGEST_NAME)
    ways, steps = _effort(body)
    steps *= sum(ways ** count for count in range(high))
    return min(high - low + 1, WAYS) if ways == 1 else sum(ways ** count for count in range(low, high + 1)), 1 + steps


def _exclude_each_other(bodies: Iterable) -> bool:
    """Whether alternatives begin with letters of which a name can have only one at a place, whatever their case."""
    firsts = [body[0] for body in bodies if len(body)]
    letters = {chr(value).lower() for kind, value in firsts if str(kind) == "LITERAL" and value < 128}
    return len(letters) == len(bodies)
