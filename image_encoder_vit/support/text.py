"""Text from outside, as names of files and messages of other libraries, made fit for a terminal."""


def visible(text: str) -> str:
    """`text` on one line, with every control and other unprintable character written out as an escape."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def message_of(error: BaseException, lines: int = 1) -> str:
    """
    The first lines of an error's message, each `visible`; the name of its class where it has none. Of an error in a
    DataLoader's worker process the message itself, without the traceback that PyTorch puts around it.
    """
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    if text and text[0].startswith("Caught "):
        text = [text[-1].partition(": ")[2]]
    return "\n".join(map(visible, text[:lines])) or type(error).__name__


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
