"""Gradient clipping for PyTorch: torch's own functions, a clipper, and attach."""

from gradclip.extras import needed as _needed

# ruff: noqa: E402 - what is missing is named before it is needed.
_needed("torch", "torch")

from gradclip.torch.attach import attach
from gradclip.torch.clipper import Clipper
from gradclip.torch.doctor import ClipWarning
from gradclip.torch.dtensors import whole
from gradclip.torch.functional import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip.torch.placement import Pieces
from gradclip.torch.verify import VerifyError

__all__ = [
    "ClipWarning",
    "Clipper",
    "Pieces",
    "VerifyError",
    "attach",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "whole",
]
