"""The rules: each decides the largest norm let through, and nothing else.

A rule is a frozen dataclass whose `update` is plain scalar text: NumPy, torch and JAX
run the same lines. It sees norms of any shape (one, or one per tensor or unit), keeps
its memory in a dictionary of arrays that the caller owns, and never touches gradients.
"""

from gradclip.rules.band import Band as Band
from gradclip.rules.base import Array as Array
from gradclip.rules.base import Measured as Measured
from gradclip.rules.base import Rule as Rule
from gradclip.rules.base import Scope as Scope
from gradclip.rules.base import State as State
from gradclip.rules.chaining import chain as chain
from gradclip.rules.chaining import stages as stages
from gradclip.rules.deviation import Deviation as Deviation
from gradclip.rules.ema import EMA as EMA
from gradclip.rules.ema import AdaGC as AdaGC
from gradclip.rules.groups import by_name as by_name
from gradclip.rules.keeping import held as held
from gradclip.rules.keeping import usable as usable
from gradclip.rules.limits import Limit as Limit
from gradclip.rules.moment import SPAM as SPAM
from gradclip.rules.moment import Moment as Moment
from gradclip.rules.moving_band import AGGC as AGGC
from gradclip.rules.moving_band import MovingBand as MovingBand
from gradclip.rules.norm import Norm as Norm
from gradclip.rules.normalize import Normalize as Normalize
from gradclip.rules.peak import AdaClip as AdaClip
from gradclip.rules.peak import Peak as Peak
from gradclip.rules.percentile import AutoClip as AutoClip
from gradclip.rules.percentile import Percentile as Percentile
from gradclip.rules.quantile import Quantile as Quantile
from gradclip.rules.relative import AGC as AGC
from gradclip.rules.relative import Relative as Relative
from gradclip.rules.rms import RMS as RMS
from gradclip.rules.skip import Skip as Skip
from gradclip.rules.smooth import Smooth as Smooth
from gradclip.rules.stabilize import AdaGN as AdaGN
from gradclip.rules.stabilize import Stabilize as Stabilize
from gradclip.rules.value import Value as Value
from gradclip.rules.zscore import ZClip as ZClip
from gradclip.rules.zscore import ZScore as ZScore
