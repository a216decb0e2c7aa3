"""Where the threshold belongs, told from what a run has recorded."""

from gradclip.advice.advising import Advice, advise
from gradclip.advice.replaying import Replay, replay

__all__ = ["Advice", "Replay", "advise", "replay"]
