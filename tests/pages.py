"""Pages as a sequence of code blocks, for a Python that has nothing installed."""

import re

BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    """Return each block of a page: the words behind its fence, and its text."""
    text = page.read_text("utf-8")
    return [(info.split(), text) for info, text in BLOCK.findall(text)]


def version(diff, dropped):
    """Return one of the two programs in a diff: the one without the dropped lines."""
    lines = [line for line in diff.splitlines() if not line.startswith(dropped)]
    return "\n".join(line[1:] for line in lines)
