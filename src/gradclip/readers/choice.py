"""Which column is the norm before clipping, which the step: told by their names."""

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from gradclip.readers.columns import Columns
from gradclip.record import LogError
from gradclip.wording import sentence

# Whole words only: avg_norm and img_norm end in a g as well.
NORM = re.compile(
    r"(?<![a-z])(?:g|grads?|gradients?)[\W_]*(?:(?:\d\.\d|inf|l2|total|global|clip)"
    r"[\W_]*)*norms?(?![a-z])|gnorm|norm[\W_]*(?:of[\W_]*)?grad|before[\W_]*clip"
    r"|after[\W_]*clip|(?<![\w/.])total[\W_]*norm(?![a-z])",
    re.IGNORECASE,
)
# The bare word clip is not enough: eps_clip and policy/clip are ranges of PPO.
LIMIT = re.compile(
    r"max[\W_]*(?:grad[\W_]*)?norm|clip[\W_]*(?:grad[\W_]*)?(?:norm|value|threshold)$"
    r"|clip[\W_]*grad(?:ient)?s?$|(?:grad|gradient)[\W_]*clip(?:ping)?$"
    r"|grad[\W_]*clip[\W_]*(?:val|norm)$|grad(?:ient)?[\W_]*limit$",
    re.IGNORECASE,
)
# In gradNormAfterClip the word stands in the middle, and crafter is another one.
AFTER = re.compile(
    r"(?<![a-z])after|(?-i:After)|post[\W_]*clip|(?<!un)clipped(?![a-z])", re.IGNORECASE
)
OTHER = re.compile(
    r"__(?:MIN|MAX)$|(?i:(?<![a-z])log_grad"
    r"|norms?[\W_]*(?:ratio|sq(?:uared?)?|log|std|var)(?![a-z]))"
)
"""What is made of a norm; Weights & Biases exports the range of each column."""
RUN = re.compile(r"^.+ - ")
"""What it puts before a column: the name of the run."""
AVERAGE = re.compile(r"avg|average|mean|(?:^|[\W_])ema", re.IGNORECASE)
FIRST = re.compile(
    r"before|pre[\W_]*clip|unclipped|(?<![a-z])raw(?![a-z])|total|global|val$",
    re.IGNORECASE,
)
# The first that is there counts: an epoch only where there is nothing better.
STEPS = (
    "step",
    "global_step",
    "_step",
    "iteration",
    "iter",
    "iterations",
    "num_updates",
    "num_iters",
    "update",
    "updates",
    "train_step",
    "steps",
    "global_step/max_steps",
    "trainer/global_step",
    "train/global_step",
    "epoch",
)
LOSSES = (
    "loss",
    "train_loss",
    "train/loss",
    "lm loss",
    "training_loss",
    "loss_step",
    "train_loss_step",
    "train/samples/train_loss",
    "learning/loss",
    "reduced_train_loss",
    "train/crossentropyloss",
    "train/ce loss",
    "loss/train/total",
)
MOST = 3
"""More columns than this without a total are the norms of modules."""


def choose_norm(columns: Columns, source: str) -> tuple[str, tuple[str, ...]]:
    """Return the column with the norm before clipping, and those of other networks.

    Raises:
        LogError: If there is none, or nothing but norms after clipping or of modules.
    """
    if columns.wanted is not None:
        return _wanted(columns, source), ()
    named = _named_norms(columns)
    found = [name for name in named if len(columns.found[name].values)]
    if not found:
        raise LogError(f"{source}: {_without_norm(columns, named)}")
    before = [name for name in found if not AFTER.search(_own(name))]
    if not before:
        raise LogError(
            f"{source}: only norms after clipping ({', '.join(found)}), which never "
            "exceed the limit in force; advice needs those before clipping."
        )
    best = _best(before, columns)
    if _only_modules(before, best):
        raise LogError(
            f"{source}: only the norms of {len(before)} modules, such as {before[0]}; "
            "name one with column=… (--column), or log the norm of all gradients."
        )
    return best[0], tuple(best[1:])


def _named_norms(columns: Columns) -> list[str]:
    """Return the columns with the name of a gradient norm, with or without numbers."""
    # The bare word may be a norm of anything, where a gradient's has its name.
    found = [name for name in columns.found if NORM.search(_own(name))]
    found = found or [name for name in columns.found if name == "norm"]
    return [x for x in found if not (_is_limit(x) or OTHER.search(x))]


def _without_norm(columns: Columns, empty: Sequence[str]) -> str:
    """Return what there is in place of a norm: columns without a number, or others."""
    if empty:
        first = columns.found[empty[0]].first_bad
        held = f"such as {first[:40]!r}" if first else "but lists, or nothing at all"
        return (
            f"no cell of {empty[0]} holds a number, {held}; write plain numbers there, "
            "or name another column with column=… (--column)."
        )
    shown = ", ".join(columns.names[:20]) or "nothing that looks like a number"
    noted = "".join(f" {sentence(note)}" for note in columns.notes)
    return (
        f"no gradient norm in it; it has {shown}. If one of them is the norm before "
        f"clipping, name it with column=… (--column).{noted}"
    )


def _own(name: str) -> str:
    """Return a name without that of its run, which says nothing about the column."""
    return RUN.sub("", name)


def _run(name: str) -> str:
    """Return what stands before a name for its run, or nothing."""
    return name.removesuffix(_own(name))


def _wanted(columns: Columns, source: str) -> str:
    wanted = columns.wanted or ""
    if wanted not in columns.found or not len(columns.found[wanted].values):
        shown = ", ".join(columns.names[:20])
        raise LogError(
            f"{source}: no numbers in a column {wanted!r}; the columns are {shown}."
        )
    return wanted


def _is_limit(name: str) -> bool:
    own = _own(name)
    # Norms before and after clipping may have the name of a limit within theirs.
    return bool(LIMIT.search(own)) and not re.search("before|after|pre|post", own, re.I)


def is_before_clipping(name: str) -> bool:
    """Return whether a name is not that of a limit, nor of what clipping left."""
    return not (_is_limit(name) or AFTER.search(_own(name)))


def _best(names: Sequence[str], columns: Columns) -> list[str]:
    """Return the most telling column of each network, the longest first."""

    def rank(name: str) -> tuple[bool, bool, bool, int]:
        values = np.frombuffer(columns.found[name].values)
        first = bool(FIRST.search(_own(name)))
        # grad_norm_avg may be NaN throughout: one overflow stays in a running mean.
        broken = not np.isfinite(values).any()
        return broken, bool(AVERAGE.search(_own(name))), not first, -len(values)

    networks: dict[str, list[str]] = {}
    for name in names:
        networks.setdefault(network_of(name), []).append(name)
    return sorted((min(group, key=rank) for group in networks.values()), key=rank)


def network_of(name: str) -> str:
    """Return what stands before the norm in a name: `actor` in `actor/grad_norm`."""
    own = _own(name)
    found = NORM.search(own)
    prefix = re.sub(
        r"(?i)(?<![a-z])(train(ing)?|debug|metrics?|optim(izer)?|grads?|raw)(?![a-z])",
        "",
        own[: found.start()] if found else "",
    )
    return f"{name.removesuffix(own)}{prefix}".strip("/._- ").lower()


def _only_modules(names: Sequence[str], best: Sequence[str]) -> bool:
    whole = [n for n in names if FIRST.search(_own(n)) or not _inside(n)]
    return len(best) + len(names) > 2 * MOST and not whole


def _inside(name: str) -> bool:
    """Return whether a name says more than that it is a gradient norm."""
    rest = NORM.sub("", _own(name))
    return bool(re.sub(r"(?i)^(train(ing)?|metrics?)[/._]", "", rest).strip("/._- "))


def choose_step(columns: Columns, norm: str) -> str | None:
    """Return the column with the steps: known by name, and in the rows of the norm."""
    return _beside(STEPS, columns, norm)


def choose_loss(columns: Columns, norm: str) -> str | None:
    """Return the column with the loss, if one is known by its name."""
    return _beside(LOSSES, columns, norm)


def _beside(known: Iterable[str], columns: Columns, norm: str) -> str | None:
    run = _run(norm)
    # What the same run has of its own goes before what all of them share.
    shared = {name.lower().strip(): name for name in columns.found}
    own = {_own(name).lower(): name for name in columns.found if _run(name) == run}
    names, rows = shared | own, np.frombuffer(columns.found[norm].rows, np.int64)
    for name in known:
        if name in names:
            other = np.frombuffer(columns.found[names[name]].rows, np.int64)
            # A column of an evaluation has few rows in common with a norm.
            if np.isin(rows, other).mean() > 0.5:
                return names[name]
    return None


def choose_limit(columns: Columns, norm: str) -> str | None:
    """Return the column with the limit in force, if there is one."""
    for name in columns.found:
        if _run(name) not in ("", _run(norm)):
            continue
        if name == "limit" or _is_limit(name):
            return name
    return None


def known_limit(value: float) -> float:
    """Return a limit in force; frameworks write 0 or less for no clipping."""
    return value if value > 0 else math.inf if value <= 0 else math.nan
