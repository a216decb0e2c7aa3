"""Gradient clipping for PyTorch: torch's own functions, a clipper, and attach."""

from gradclip.extras import needed as _needed

# ruff: noqa: E402 - what is missing is named before it is needed.
_needed("torch", "torch")

from gradclip.torch.attach import attach as attach
from gradclip.torch.clipper import Clipper as Clipper
from gradclip.torch.doctor import ClipWarning as ClipWarning
from gradclip.torch.functional import clip_grad_norm_ as clip_grad_norm_
from gradclip.torch.functional import clip_grad_value_ as clip_grad_value_
from gradclip.torch.functional import clip_grads_with_norm_ as clip_grads_with_norm_
from gradclip.torch.functional import get_total_norm as get_total_norm
from gradclip.torch.placement import Pieces as Pieces
from gradclip.torch.verify import VerifyError as VerifyError
