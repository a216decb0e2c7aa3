"""A clipper that optimizers call: its hooks, and what becomes of them in a copy."""

from collections.abc import Sequence
from typing import Any

from gradclip.torch.clipper import Clipper


class Hooked(Clipper):
    """A clipper that acts in the steps of optimizers."""

    _hooks: Sequence[Any] = ()

    def _register(self) -> None:
        """Have the optimizers call this at every step."""
        raise NotImplementedError

    def _undo(self) -> None:
        """Put back what was changed for the duration of one step."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take the clipping out of the optimizers again."""
        # A step that was interrupted has left something changed.
        self._undo()
        self._doctor.unwatch()
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the hooks, which no optimizer takes into a copy."""
        return {**self.__dict__, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the hooks again, unless they had been taken out."""
        self.__dict__.update(state)
        self._hooks = ()
        if state["_hooks"]:
            self._register()
