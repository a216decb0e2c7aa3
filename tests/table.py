"""The rules as a table: a new rule is one row, and inherits every law."""

import math
import os
from dataclasses import dataclass

import gradclip as gc
import reference

EVERYWHERE = "GRADCLIP_GOLDEN" in os.environ
"""Set by `make golden`: every row is compiled, for JAX too, some seconds each."""


@dataclass(frozen=True)
class Row:
    make: object
    twin: object
    keeps_direction: bool = True
    """Whether a cell is only rescaled."""
    projects: bool = True
    """Whether clipping twice is clipping once."""
    drops: bool = False
    """Whether a whole step may be dropped."""
    scales: object = None
    """The rule for gradients that are c times as large, if limits have that unit."""


def _row(name, *args, **options):
    kwargs = options.pop("rule", {})
    return Row(
        lambda: getattr(gc, name)(*args, **kwargs),
        lambda: getattr(reference, name)(*args, **kwargs),
        **options,
    )


def over(scope, **more):
    return {"over": scope, **more}


ROWS = {
    "norm": _row("Norm", 1.0, scales=lambda c: gc.Norm(c)),
    "norm-p1": _row("Norm", 3.0, rule={"p": 1.0}, scales=lambda c: gc.Norm(3 * c, p=1)),
    "norm-inf": _row("Norm", 0.7, rule={"p": math.inf}),
    "norm-tensor": _row("Norm", 1.0, rule=over("tensor")),
    "norm-unit": _row("Norm", 0.5, rule=over("unit")),
    "norm-element": _row("Norm", 0.5, rule=over("element"), keeps_direction=False),
    "value": _row(
        "Value", 0.5, keeps_direction=False, scales=lambda c: gc.Value(c / 2)
    ),
    "normalize": _row("Normalize", 2.0, scales=lambda c: gc.Normalize(2 * c)),
    "normalize-eps": _row("Normalize", 2.0, rule={"eps": 0.1}, projects=False),
    "normalize-tensor": _row("Normalize", 0.5, rule=over("tensor")),
    "normalize-unit": _row("Normalize", 0.5, rule=over("unit")),
    "sign": _row("Normalize", 1.0, rule=over("element"), keeps_direction=False),
    "agc": _row("Relative", 0.1),
    "agc-last-axis": _row("Relative", 0.1, rule={"axis": -1}),
    "norm-unit-last-axis": _row("Norm", 0.5, rule=over("unit", axis=-1)),
    "agc-tensor": _row("Relative", 0.1, rule=over("tensor")),
    "percentile": _row("Percentile", 30.0, scales=lambda c: gc.Percentile(30.0)),
    "percentile-window": _row("Percentile", 50.0, rule={"window": 7}),
    "percentile-whole": _row("Percentile", 10.0, rule={"window": None}),
    "percentile-tensor": _row("Percentile", 30.0, rule=over("tensor", window=20)),
    "zscore": _row(
        "ZScore", 1.5, rule={"warmup": 5}, scales=lambda c: gc.ZScore(1.5, warmup=5)
    ),
    "zscore-default": _row("ZScore"),
    "zscore-max": _row("ZScore", 2.0, rule={"warmup": 3, "max_limit": 1.0}),
    "zscore-tensor": _row("ZScore", 2.0, rule=over("tensor", warmup=4, decay=0.9)),
    "zscore-mean": _row("ZScore", 2.0, rule={"warmup": 4, "mode": "mean"}),
    "zscore-threshold": _row("ZScore", 2.0, rule={"warmup": 4, "mode": "threshold"}),
    "ema-tensor": _row(
        "EMA", rule={"warmup": 5}, scales=lambda c: gc.EMA(1.05, warmup=5)
    ),
    "ema-limited-tensor": _row(
        "EMA", 1.2, rule={"warmup": 8, "decay": 0.9, "warmup_limit": 1.0}
    ),
    "ema": _row("EMA", 1.5, rule=over("all", warmup=3)),
    "deviation": _row(
        "Deviation",
        1.5,
        rule={"window": 20, "warmup": 4},
        scales=lambda c: gc.Deviation(1.5, window=20, warmup=4),
    ),
    "deviation-tensor": _row("Deviation", 2.0, rule=over("tensor", window=9, warmup=3)),
    "smooth": _row("Smooth", 1.0, projects=False, scales=lambda c: gc.Smooth(c)),
    "smooth-tanh": _row("Smooth", 1.0, rule={"curve": "tanh"}, projects=False),
    "smooth-tensor": _row("Smooth", 0.5, rule=over("tensor"), projects=False),
    "smooth-unit": _row("Smooth", 0.5, rule=over("unit"), projects=False),
    "smooth-element": _row(
        "Smooth", 0.5, rule=over("element"), projects=False, keeps_direction=False
    ),
    "smooth-root": _row("Smooth", 1.0, rule={"curve": "root"}, projects=False),
    "rms-tensor": _row("RMS", 0.3, scales=lambda c: gc.RMS(0.3 * c)),
    "rms": _row("RMS", 0.2, rule=over("all")),
    "band": _row(
        "Band",
        0.1,
        0.8,
        keeps_direction=False,
        scales=lambda c: gc.Band(c / 10, 4 * c / 5),
    ),
    "band-tensor": _row("Band", 0.9, 2.0, rule=over("tensor")),
    "band-moving-tensor": _row(
        "MovingBand", 0.8, 1.3, scales=lambda c: gc.MovingBand(0.8, 1.3)
    ),
    "band-moving": _row("MovingBand", 0.0, 1.1, rule=over("all", warmup=4)),
    "quantile": _row("Quantile", scales=lambda c: gc.Quantile()),
    "quantile-tensor": _row("Quantile", 90.0, rule=over("tensor", rate=0.1, start=3.0)),
    "moment-tensor": _row(
        "Moment", keeps_direction=False, scales=lambda c: gc.Moment()
    ),
    "moment-corrected-tensor": _row(
        "Moment", 1.5, 0.9, 3, rule={"corrected": True}, keeps_direction=False
    ),
    "peak-tensor": _row("Peak", keeps_direction=False, scales=lambda c: gc.Peak()),
    "peak-short-tensor": _row("Peak", 0.99, keeps_direction=False),
    "stabilize-tensor": _row("Stabilize"),
    "stabilize": _row("Stabilize", 0.85, 0.99, rule=over("all", eps=1e-8)),
}


def _skip(name, *args, **kwargs):
    return Row(
        lambda: gc.Skip(getattr(gc, name)(*args, **kwargs)),
        lambda: reference.Skip(getattr(reference, name)(*args, **kwargs)),
        drops=True,
    )


ROWS |= {
    "skip-norm": _skip("Norm", 5.0),
    "skip-value": _skip("Value", 2.0),
    "skip-deviation": _skip("Deviation", 6.0, window=30, warmup=9),
    "skip-zscore-tensor": _skip("ZScore", 3.0, warmup=6, over="tensor"),
}
# One group that all tensors fall into, having a name, is a rule over all of them.
ROWS["groups"] = Row(
    lambda: gc.by_name({"none": gc.Norm(0.1), "?*": gc.Norm(1.0)}),
    lambda: reference.Norm(1.0),
    scales=lambda c: gc.by_name({"none": None, "?*": gc.Norm(c)}),
)
ROWS["groups-zscore"] = Row(
    lambda: gc.by_name({"none": gc.ZScore(), "?*": gc.ZScore(1.5, warmup=5)}),
    lambda: reference.ZScore(1.5, warmup=5),
)
ROWS["groups-ema-tensor"] = Row(
    lambda: gc.by_name({"none": None, "?*": gc.EMA(warmup=5)}),
    lambda: reference.EMA(warmup=5),
)
ROWS["groups-moving"] = Row(
    lambda: gc.by_name({"none": None, "?*": gc.MovingBand(0.7, 1.2, over="all")}),
    lambda: reference.MovingBand(0.7, 1.2, over="all"),
)
ROWS["groups-agc"] = Row(
    lambda: gc.by_name({"none": gc.Norm(0.1), "?*": gc.AGC(0.1)}),
    lambda: reference.Relative(0.1),
)
# A rule over units in another group makes all norms those of units.
UNITS = gc.Norm(1.0, over="unit", axis=-1)
ROWS["groups-ema-beside-units-tensor"] = Row(
    lambda: gc.by_name({"none": UNITS, "?*": gc.EMA(warmup=5)}),
    lambda: reference.EMA(warmup=5),
)
ROWS["groups-rms-beside-units"] = Row(
    lambda: gc.by_name({"none": UNITS, "?*": gc.RMS(0.2, over="all")}),
    lambda: reference.RMS(0.2, over="all"),
)
ROWS["chain-skip"] = Row(
    lambda: gc.chain(gc.ZScore(2.0, warmup=4), gc.Skip(gc.Norm(4.0))),
    lambda: reference.Chain(
        reference.ZScore(2.0, warmup=4), reference.Skip(reference.Norm(4.0))
    ),
    drops=True,
)
ROWS["chain"] = Row(
    lambda: gc.chain(gc.Value(0.5), gc.Normalize(1.0)),
    lambda: reference.Chain(reference.Value(0.5), reference.Normalize(1.0)),
    keeps_direction=False,
    projects=False,
)
ROWS["chain-stateful"] = Row(
    lambda: gc.chain(gc.Norm(0.8, over="tensor"), gc.ZScore(1.0, warmup=4)),
    lambda: reference.Chain(
        reference.Norm(0.8, over="tensor"), reference.ZScore(1.0, warmup=4)
    ),
)
STATELESS = [name for name, row in ROWS.items() if not row.make().stateful]
STATEFUL = [name for name in ROWS if name not in STATELESS]
