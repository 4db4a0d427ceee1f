"""Names and choices as the sentences for people give them."""

from collections.abc import Iterable

LONGEST = 80  # characters; the longest name of a UNet's tensor has 78
NAMED = 5  # choices


def quoted(name: object) -> str:
    """A name from a file or an input, as sentences give it: printable, on one line, cut in its middle if it is long."""
    text = "".join(character if character.isprintable() else "?" for character in str(name))
    half = (LONGEST - len("...")) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


def listed(names: Iterable[str]) -> str:
    """Names for a sentence: ``SD1.5, SDXL and SVD``."""
    *names, last = names
    return f"{', '.join(names)} and {last}"


def either(names: Iterable[str]) -> str:
    """Choices for a sentence: ``a, b or c``, and of many the first ones."""
    names = list(dict.fromkeys(names))
    *names, last = names if len(names) <= NAMED else [*names[:NAMED], "another"]
    return f"{', '.join(names)} or {last}" if names else last
