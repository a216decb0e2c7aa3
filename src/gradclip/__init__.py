"""Gradient clipping, complete: measure a norm, choose a limit, rescale."""

from gradclip.advice import advise as advise
from gradclip.arrays import Clipper as Clipper
from gradclip.arrays import clip as clip
from gradclip.carrying import UClip as UClip
from gradclip.decision import Info as Info
from gradclip.history import History as History
from gradclip.policy import NonFiniteError as NonFiniteError
from gradclip.replaying import replay as replay
from gradclip.rules import AGC as AGC
from gradclip.rules import AGGC as AGGC
from gradclip.rules import EMA as EMA
from gradclip.rules import RMS as RMS
from gradclip.rules import SPAM as SPAM
from gradclip.rules import AdaClip as AdaClip
from gradclip.rules import AdaGC as AdaGC
from gradclip.rules import AdaGN as AdaGN
from gradclip.rules import AutoClip as AutoClip
from gradclip.rules import Band as Band
from gradclip.rules import Deviation as Deviation
from gradclip.rules import Moment as Moment
from gradclip.rules import MovingBand as MovingBand
from gradclip.rules import Norm as Norm
from gradclip.rules import Normalize as Normalize
from gradclip.rules import Peak as Peak
from gradclip.rules import Percentile as Percentile
from gradclip.rules import Quantile as Quantile
from gradclip.rules import Relative as Relative
from gradclip.rules import Rule as Rule
from gradclip.rules import Skip as Skip
from gradclip.rules import Smooth as Smooth
from gradclip.rules import Stabilize as Stabilize
from gradclip.rules import Value as Value
from gradclip.rules import ZClip as ZClip
from gradclip.rules import ZScore as ZScore
from gradclip.rules import by_name as by_name
from gradclip.rules import chain as chain

__version__ = "0.1.0"
