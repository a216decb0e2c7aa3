"""Gradient clipping, complete: measure a norm, choose a limit, rescale."""

from gradclip.arrays import Clipper as Clipper
from gradclip.arrays import clip as clip
from gradclip.pipeline import Info as Info
from gradclip.pipeline import NonFiniteError as NonFiniteError
from gradclip.rules import AGC as AGC
from gradclip.rules import AutoClip as AutoClip
from gradclip.rules import Norm as Norm
from gradclip.rules import Normalize as Normalize
from gradclip.rules import Percentile as Percentile
from gradclip.rules import Relative as Relative
from gradclip.rules import Rule as Rule
from gradclip.rules import Value as Value
from gradclip.rules import ZClip as ZClip
from gradclip.rules import ZScore as ZScore
from gradclip.rules import chain as chain

__version__ = "0.1.0"
