"""The verbs that lists of gradients need, for each array library; none is imported.

They are written once in the array API; a backend overrides what its library does
better.
"""

from gradclip.backends.base import CHUNK as CHUNK
from gradclip.backends.base import ROW as ROW
from gradclip.backends.base import Backend as Backend
from gradclip.backends.base import Scaling as Scaling
from gradclip.backends.base import at_most as at_most
from gradclip.backends.base import check_arithmetic as check_arithmetic
from gradclip.backends.base import inward as inward
from gradclip.backends.base import is_half as is_half
from gradclip.backends.choice import find_backend as find_backend
from gradclip.backends.jax import Jax as Jax
from gradclip.backends.jax import Shards as Shards
from gradclip.backends.numpy import NumPy as NumPy
from gradclip.backends.torch import TorchArrays as TorchArrays
