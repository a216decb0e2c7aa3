"""Where gradclip answers otherwise than torch.nn.utils and optax, and why."""

DEVIATIONS = {
    "finite float64 gradients of 2e200 with error_if_nonfinite": (
        "torch raises, since its norm overflows; the norm is finite and is returned"
    ),
    "half-precision gradients": (
        "torch returns the norm in their own type; it is returned in float32"
    ),
    "the scale": (
        "torch divides by norm + 1e-6, so that small norms are clipped too far; the "
        "norm afterwards is the limit here"
    ),
    "gradients with NaN or infinity": (
        "torch makes all of them NaN, or 0; they are left as they are, or treated as "
        "on_nonfinite says"
    ),
    "a limit that is negative, zero or NaN": (
        "torch reverses, erases or poisons the gradients; ValueError"
    ),
    "no gradient, or no parameters": "torch returns 0; ValueError",
    "a parameter listed twice": "torch scales it twice; it counts once",
    "sparse gradients": "torch raises; they are clipped",
}

FROM_OPTAX = {
    "norms": "optax sums in the type of the gradients; float32 or wider here",
    "scale": "optax rounds to nearest; here at most the limit, so 3e-7 shorter",
    "NaN and infinity": "optax returns NaN or zeros; here the step is dropped",
    "kernels of three axes": "optax takes 3-D as many heads; one unit per row here",
    "units": "optax takes units along the last axis; along the first one here",
}
