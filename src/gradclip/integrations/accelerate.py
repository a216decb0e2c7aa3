"""Accelerate: clip where gradients are synchronised, and after they are unscaled."""

from collections.abc import Mapping
from typing import Any

from gradclip.decision import Info
from gradclip.integrations import needed
from gradclip.torch import Clipper, whole
from gradclip.torch.attach import Attached
from gradclip.torch.in_backward import InBackward

DistributedType: Any = needed("accelerate", "accelerate").DistributedType


class Whole:
    """A clipper whose memory is saved whole, since one process writes for all.

    Args:
        clipper: Any clipper of torch's; of `Moment` and `Peak` on split parameters,
            each process remembers a part.

    Example:
        >>> whole = Whole(clipper)  # doctest: +SKIP
        >>> accelerator.register_for_checkpointing(whole)  # doctest: +SKIP
    """

    def __init__(self, clipper: Clipper) -> None:
        """Keep the clipper."""
        self.clipper = clipper

    def state_dict(self) -> dict[str, Any]:
        """Return the memory with plain tensors; all processes have to call this."""
        return whole(self.clipper.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved memory: each process takes its part.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If it belongs to another rule or other parameters.
        """
        self.clipper.load_state_dict(state)


def clip_(accelerator: Any, clipper: Clipper, optimizer: Any = None) -> Info | None:
    r"""Clip between `accelerator.backward(loss)` and `optimizer.step()`.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    `accelerator.register_for_checkpointing(clipper)` makes the memory of the rule part
    of `save_state` and `load_state`; where parameters are split and a rule remembers
    their elements, register `Whole(clipper)`.

    Args:
        accelerator: The `Accelerator`.
        clipper: A `gradclip.torch.Clipper` for the prepared model.
        optimizer: Which optimizer's gradients are unscaled under fp16; all, if not
            given. Needed where several clippers follow one another.

    Returns:
        What was done, or None in the middle of an accumulation, where nothing is.

    Raises:
        TypeError: For what is not a clipper, and for one made by `attach`.
        ValueError: Under DeepSpeed, where the step was made by `backward`.

    Example:
        >>> accelerator.backward(loss)  # doctest: +SKIP
        >>> info = clip_(accelerator, clipper)  # doctest: +SKIP
        >>> optimizer.step()  # doctest: +SKIP
    """
    if not isinstance(clipper, Clipper) or isinstance(clipper, Attached | InBackward):
        raise TypeError(
            f"clip_() takes a gradclip.torch.Clipper, not {type(clipper).__name__}; "
            "one made by attach() clips inside optimizer.step() already."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "under DeepSpeed accelerator.backward() has made the step already; use "
            "gradclip.integrations.deepspeed."
        )
    if not accelerator.sync_gradients:
        return None
    # Does nothing unless fp16 has scaled them; a second call raises (accelerate#641).
    accelerator.unscale_gradients(optimizer)
    return clipper.clip_()
