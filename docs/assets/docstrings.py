"""How our docstrings differ from what griffe expects."""

from typing import Any

from griffe import Extension, Function, Object


class OurDocstrings(Extension):
    """Set examples as sessions, and leave out what `__init__` does inside."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename `Example:`, which griffe takes for prose, to `Examples:`."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace(
                "\nExample:\n", "\nExamples:\n"
            )

    def on_function(self, *, func: Function, **_: Any) -> None:
        """Drop the line for readers of the code; the class tells the arguments."""
        if func.name == "__init__":
            func.docstring = None
