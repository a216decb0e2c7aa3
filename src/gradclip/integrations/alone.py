"""Refusals of what clips a second time, or keeps gradients away from the clip."""

from typing import Any

from gradclip.integrations import needed

TAKEN = (
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)
"""What a Keras optimizer does to gradients by itself."""


def check_alone(setting: str, value: Any, remedy: str, deepspeed: bool) -> None:
    """Refuse to clip twice, or where the clip would do nothing.

    Args:
        setting: What turns the trainer's own clip on, with `{}` for the value.
        value: The value it has.
        remedy: What to do about it.
        deepspeed: Whether DeepSpeed makes the steps.

    Raises:
        ValueError: If there is a value, and under DeepSpeed.
    """
    if value:
        raise ValueError(f"{setting.format(value)} clips too; {remedy}.")
    if deepspeed:
        raise ValueError(
            "DeepSpeed steps with gradients of its own, which this callback never "
            "sees; use gradclip.integrations.deepspeed."
        )


def check_inner(inner: Any, scaler: type, clipped: type) -> None:
    """Refuse a Keras optimizer that clips too, scales or accumulates.

    Args:
        inner: The optimizer that is to be wrapped, or one of several.
        scaler: Keras's own wrapper for loss scaling.
        clipped: The wrapper that clips.

    Raises:
        ValueError: If it is such a one.
    """
    if isinstance(inner, scaler):
        raise ValueError(
            "gradients have to be unscaled before a clip: use "
            "LossScaleOptimizer(Clipped(optimizer, rule))."
        )
    if isinstance(inner, clipped):
        raise ValueError(
            "the inner optimizer clips too; use one Clipped, with chain(a, b) for two "
            "rules."
        )
    taken = [name for name in TAKEN if getattr(inner, name, None) is not None]
    if taken:
        raise ValueError(
            f"the inner optimizer has {', '.join(taken)} set; leave that out, since "
            "Clipped has to see whole gradients, and clip them alone."
        )
    for part in getattr(inner, "optimizers", ()):
        check_inner(part, scaler, clipped)


def check_replicas(backend: str) -> None:
    """Refuse TensorFlow's replicas: each has a part of the gradients at this point.

    Args:
        backend: The backend of Keras.

    Raises:
        ValueError: If there are several.
    """
    if backend != "tensorflow":
        return
    tf = needed("keras", "tensorflow")
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas > 1:
        raise ValueError(
            f"tf.distribute adds up the gradients of its {replicas} replicas after a "
            "clip, which would see parts of them; use one replica, or "
            "keras.distribution with the JAX backend."
        )
