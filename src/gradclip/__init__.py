"""Gradient clipping, complete: measure a norm, choose a limit, rescale."""

from gradclip.advice import advise
from gradclip.arrays import Clipper, clip
from gradclip.decision import Info
from gradclip.history import History
from gradclip.policy import NonFiniteError
from gradclip.replaying import replay
from gradclip.rules import (
    AGC,
    AGGC,
    EMA,
    RMS,
    SPAM,
    AdaClip,
    AdaGC,
    AdaGN,
    AutoClip,
    Band,
    Deviation,
    Moment,
    MovingBand,
    Norm,
    Normalize,
    Peak,
    Percentile,
    Quantile,
    Relative,
    Rule,
    Skip,
    Smooth,
    Stabilize,
    Value,
    ZClip,
    ZScore,
    by_name,
    chain,
)
from gradclip.uclip import UClip

__all__ = [
    "AGC",
    "AGGC",
    "EMA",
    "RMS",
    "SPAM",
    "AdaClip",
    "AdaGC",
    "AdaGN",
    "AutoClip",
    "Band",
    "Clipper",
    "Deviation",
    "History",
    "Info",
    "Moment",
    "MovingBand",
    "NonFiniteError",
    "Norm",
    "Normalize",
    "Peak",
    "Percentile",
    "Quantile",
    "Relative",
    "Rule",
    "Skip",
    "Smooth",
    "Stabilize",
    "UClip",
    "Value",
    "ZClip",
    "ZScore",
    "advise",
    "by_name",
    "chain",
    "clip",
    "replay",
]
__version__ = "0.1.0"
