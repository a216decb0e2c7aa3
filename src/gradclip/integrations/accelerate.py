"""Accelerate: clip where gradients are synchronised, and after they are unscaled."""

from typing import Any

from gradclip.decision import Info
from gradclip.integrations import needed
from gradclip.torch import Clipper
from gradclip.torch.attach import Attached
from gradclip.torch.in_backward import InBackward

DistributedType: Any = needed("accelerate", "accelerate").DistributedType


def clip_(accelerator: Any, clipper: Clipper, optimizer: Any = None) -> Info | None:
    r"""Clip between `accelerator.backward(loss)` and `optimizer.step()`.

    $g \leftarrow g \cdot \min(1, \text{limit}_t / \lVert g \rVert)$

    `accelerator.register_for_checkpointing(clipper)` makes the memory of the rule part
    of `save_state` and `load_state`.

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
