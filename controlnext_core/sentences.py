"""Names as the sentences for people quote them."""

LONGEST = 80  # characters; the longest name of a UNet's tensor has 78


def quoted(name: object) -> str:
    """A name from a file or an input, as sentences give it: printable, on one line, cut in its middle if it is long."""
    text = "".join(character if character.isprintable() else "?" for character in str(name))
    half = (LONGEST - len("...")) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"
