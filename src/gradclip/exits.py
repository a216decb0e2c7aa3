"""How the commands end, where it is not with 0; wrong options end with 2."""

FAILED = 1
"""A log cannot be read, a script fails, or a package is missing."""
REFUSED = 3
"""A log supports no recommendation, or a clip is out of place."""
INTERRUPTED = 130
"""By Ctrl-C."""
