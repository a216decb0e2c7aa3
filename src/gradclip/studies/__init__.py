"""Experiments behind the claims about clipping, small enough to run again.

`gradclip study NAME --out DIR` runs one. A study is one file here, which says what is
trained and what follows from it; `frame` has the seeds, the resuming and the files,
`statistics` the intervals, `tables` and `page` how they are shown.
"""

STUDIES = {
    "temporal-order": "Does clipping let a recurrent network learn longer sequences?",
    "smoothness": "Does clipping save steps where the curvature grows with the slope?",
    "spikes": "Which rules carry a run through spikes, and with a wrong threshold?",
    "language-model": "Does clipping allow a higher learning rate?",
    "generalisation": "Does clipping generalise, beside L1, L2 and dropout?",
    "bias": "Where does clipping lead somewhere else?",
    "threshold": "Does `advise` put the limit where training goes best?",
}
"""The question of each study."""


def listing() -> str:
    """Return the names and questions of all studies."""
    width = max(map(len, STUDIES))
    return "\n".join(f"{name:<{width}}  {what}" for name, what in STUDIES.items())
