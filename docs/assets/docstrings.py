"""Read `Example:` in our docstrings as code, where griffe knows `Examples:` alone."""

from typing import Any

from griffe import Extension, Object


class OneExample(Extension):
    """Rename the section, so that its lines are set as a session and not as prose."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename it in the docstring of anything that has one."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace(
                "\nExample:\n", "\nExamples:\n"
            )
