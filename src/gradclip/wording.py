"""Numbers and names in sentences."""

from collections.abc import Sequence

ONE = {"are": "is", "were": "was", "have": "has", "repeat": "repeats"}
WORDS = ("norm", "step", "row", "line", "run", "spike", "stage", "time", "call")
ONE |= {f"{x}s": x for x in WORDS}


def counted(count: int, words: str) -> str:
    """Return a count with what it counts: one with the words for one.

    Example:
        >>> counted(1, "norms are"), counted(0, "spikes")
        ('1 norm is', '0 spikes')
    """
    if count == 1:
        words = " ".join(ONE.get(word, word) for word in words.split(" "))
    return f"{count} {words}"


def ordinal(number: int) -> str:
    """Return which one of a row a number stands for.

    Example:
        >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 112, 23)]
        ['1st', '2nd', '3rd', '4th', '11th', '112th', '23rd']
    """
    teens = number // 10 % 10 == 1
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return names as a list, without those that nobody would read.

    Example:
        >>> listed(["a", "b"]), listed(["a", "b", "c"], most=2), listed([])
        ('a, b', 'a, b and 1 more', '')
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def sentence(text: str) -> str:
    """Return a text that begins with a capital, unless it begins with a name.

    Example:
        >>> sentence("the log"), sentence("a.csv is damaged"), sentence("lr/x is low")
        ('The log', 'a.csv is damaged', 'lr/x is low')
    """
    first = text.partition(" ")[0]
    named = any(sign in first.rstrip(".,:;") for sign in "._/=")
    return text if named else text[:1].upper() + text[1:]
