"""Run a training script for some steps, and tell what its clipping really did.

Every sentence says what was seen, with its step; what a line of the script is meant to
do is not guessed.
"""

import json
import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

from gradclip.exits import FAILED, INTERRUPTED, REFUSED
from gradclip.program import Ended, without_us
from gradclip.program import Program as Program
from gradclip.program import examine as examine
from gradclip.torch.ledger import EFFECTIVE, INSIDE, MEASURES, Clip, Ledger
from gradclip.wording import counted


class Fault(NamedTuple):
    """A kind of misuse: where the call stands, what was seen of it, what to do."""

    place: str
    seen: str
    do: str


BETWEEN = "Clip after backward() and before step()."
FAULTS = {
    "used": Fault(
        "after the step that used the gradients",
        "that step had used the gradients already, and no backward() lay between",
        BETWEEN,
    ),
    "early": Fault(
        "before backward()",
        "the clip found no gradients or zeros, and backward() came after it",
        BETWEEN,
    ),
    "absent": Fault(
        "without gradients",
        "none of the {given} tensors had a gradient, and no backward() left one there",
        "Are they the parameters that are trained, and are their gradients kept?",
    ),
    "exhausted": Fault(
        "without parameters",
        "the iterator of parameters had nothing left, and nothing was clipped",
        "An iterator can be used once: hand over model.parameters() itself, or a list.",
    ),
    "raw": Fault(
        "on gradients in place of parameters",
        "the {given} tensors are gradients and have none of their own, so that nothing "
        "was scaled",
        "Hand over the parameters.",
    ),
    "scaled": Fault(
        "before the loss scale was taken out",
        "the gradients were {detail} times too large: the loss scale was taken out "
        "after the clip",
        "Call scaler.unscale_(optimizer) before it.",
    ),
    "added": Fault(
        "before backward() added to the gradients",
        "backward() added to the clipped gradients before a step used them",
        "Clip once, after the last micro-batch.",
    ),
    "remade": Fault(
        "before a closure made the gradients anew",
        "the closure made the gradients anew inside step(), which never saw those that "
        "were clipped",
        "Clip in the closure, after backward(), or use attach().",
    ),
    "unsynced": Fault(
        "before the gradients were reduced over processes",
        "all_reduce() changed the gradients after the clip",
        "Clip after it.",
    ),
    "twice": Fault(
        "again on the same gradients",
        "the same gradients had just been clipped by {detail}",
        "Leave one of them out.",
    ),
}
WITHOUT_EFFECT = ("used", "early", "absent")
"""Told of a line only if no call of it had an effect: a loop may pass idle parts by."""
WELL = "Nothing was seen that needs mending."
BAD = (
    "All is in its place, but norms were NaN or infinite: a step with such gradients "
    "spoils the parameters, unless it is skipped, as attach() does by default."
)
UNSEEN = "No call that clips was seen; one written by hand is not noticed."
PLACES = {kind: fault.place for kind, fault in FAULTS.items()} | {
    EFFECTIVE: "after backward() and before step()",
    INSIDE: "inside step()",
    MEASURES: "without a limit, to measure",
    "": "and no step with these gradients",
}


@dataclass(frozen=True)
class Line:
    """All calls of one line that clips."""

    site: str
    call: str
    clips: list[Clip] = field(default_factory=list)

    @property
    def bad(self) -> list[int]:
        """Which calls met a norm that is NaN or infinite."""
        pairs = enumerate(self.clips)
        return [i for i, x in pairs if x.present and not math.isfinite(x.norm)]

    def counts(self) -> dict[str, int]:
        """Return how many calls came to what."""
        kinds = [kind_of(clip) for clip in self.clips]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def faults(self) -> list[str]:
        """Return what is wrong with it, the most frequent first."""
        found = self.counts()
        faults = sorted((k for k in found if k in FAULTS), key=lambda k: -found[k])
        # A call before the first step cannot tell late from early, but the rest can.
        idle = [kind for kind in faults if kind in WITHOUT_EFFECT]
        dropped = idle if EFFECTIVE in found or INSIDE in found else idle[1:]
        return [kind for kind in faults if kind not in dropped]


def lines_of(ledger: Ledger) -> list[Line]:
    """Return the lines that clip, in the order of their first call."""
    found: dict[tuple[str, str], Line] = {}
    for clip in ledger.clips:
        key = clip.site, clip.call
        found.setdefault(key, Line(*key)).clips.append(clip)
    return list(found.values())


def kind_of(clip: Clip) -> str:
    """Return what a call came to, also where nothing followed that would tell."""
    return "absent" if not clip.verdict and not clip.present else clip.verdict


def findings(ledger: Ledger) -> list[dict[str, Any]]:
    """Return what was seen to be wrong, as sentences with their numbers."""
    return [finding(line, kind) for line in lines_of(ledger) for kind in line.faults()]


def finding(line: Line, kind: str) -> dict[str, Any]:
    """Return one thing that is wrong with a line, and where it was first seen."""
    calls = [clip for clip in line.clips if kind_of(clip) == kind]
    first = calls[0]
    when = f"after {first.after}" if first.after else "before any step"
    fault = FAULTS[kind]
    seen = fault.seen.format(given=first.given, detail=first.detail)
    return {
        "line": line.site,
        "call": line.call,
        "kind": kind,
        "calls": len(calls),
        "of": len(line.clips),
        "first": when,
        "message": f"in {len(calls)} of {len(line.clips)} calls, first {when}: {seen}. "
        f"{fault.do}",
    }


def to_dict(ledger: Ledger, ended: Ended) -> dict[str, Any]:
    """Return all that was seen, as JSON takes it."""
    return {
        "ended": ended.how,
        "backward": ledger.backwards,
        "optimizers": [
            {
                "name": s.name,
                "steps": s.steps,
                "steps_after_a_clip": s.clipped_for,
                "parameters": s.params,
                "parameters_clipped": s.covered,
            }
            for s in ledger.steppers
        ],
        "clips": [
            {
                "line": line.site,
                "call": line.call,
                "calls": len(line.clips),
                "clipped": sum(clip.clipped for clip in line.clips),
                "not_finite": len(line.bad),
                "came_to": line.counts(),
            }
            for line in lines_of(ledger)
        ],
        "findings": findings(ledger),
    }


def to_text(program: Program, ledger: Ledger, ended: Ended) -> str:
    """Return all that was seen, as a person reads it."""
    times = counted(ledger.backwards, "times")
    parts = [f"{program.name} {ended.how}; backward() was called {times}."]
    if not any(s.steps for s in ledger.steppers):
        parts.append("No torch optimizer took a step in this process.")
    parts += [
        f"{s.name}: {counted(s.steps, 'steps')}; {s.clipped_for} of them with "
        "gradients as a clip had left them "
        f"({s.covered} of its {s.params} parameters)."
        for s in ledger.steppers
    ]
    lines = lines_of(ledger)
    parts += [f"\n{line.site}\n{paragraph(line)}" for line in lines]
    found = findings(ledger)
    parts += [f"\n{x['line']}: {x['call']}: {x['message']}" for x in found]
    if not ledger.clips and any(s.steps for s in ledger.steppers):
        parts.append(f"\n{UNSEEN}")
    elif not found and ledger.clips:
        parts.append(f"\n{BAD if any(line.bad for line in lines) else WELL}")
    return "\n".join(parts)


def paragraph(line: Line) -> str:
    """Return what one line did: how often it fired, on what, and where it stands."""
    clips = line.clips
    fired = sum(clip.clipped for clip in clips)
    norms, limits = ([getattr(c, name) for c in clips] for name in ("norm", "limit"))
    # The most of all calls: gradients may be missing at the first ones.
    given = max(clip.given for clip in clips)
    present = max(clip.present for clip in clips)
    places = ", ".join(
        f"{count} {PLACES[kind]}" for kind, count in line.counts().items()
    )
    bad = ""
    if line.bad:
        bad = f" ({len(line.bad)} NaN or infinite, first in call {line.bad[0] + 1})"
    return (
        f"    {line.call}\n"
        f"    {counted(len(clips), 'calls')}, {fired} of them clipped; "
        f"norm {span(list(filter(math.isfinite, norms)))}{bad}, limit "
        f"{span(limits)}; {present} of {given} tensors with a gradient\n"
        f"    {places}"
    )


def span(numbers: Sequence[float]) -> str:
    """Return the range of some numbers, in a few digits."""
    # NaN, which is not equal to itself, would leave the others unsorted.
    known = sorted(x for x in numbers if x == x) or [float("nan")]
    ends = dict.fromkeys(f"{x:.4g}" for x in (known[0], known[-1]))
    return " to ".join(ends)


def check_up(
    program: Program,
    arguments: Sequence[str],
    steps: int,
    json_to: TextIO | None = None,
) -> int:
    """Run a program, tell what was seen, and return the exit code.

    Args:
        program: The file, or the module.
        arguments: What it is started with.
        steps: How many steps are watched.
        json_to: Where JSON is written; None prints text.
    """
    ledger, ended = examine(program, arguments, steps)
    # An exit is the script's own word, and no fault whose place has to be shown.
    if ended.error is not None and not isinstance(ended.error, SystemExit):
        traceback.print_exception(without_us(ended.error))
    seen = to_dict(ledger, ended)
    text = json.dumps(seen, indent=2) if json_to else to_text(program, ledger, ended)
    print(text, file=json_to, flush=True)
    if isinstance(ended.error, KeyboardInterrupt):
        return INTERRUPTED
    if ended.error is not None or not any(s.steps for s in ledger.steppers):
        return FAILED
    return REFUSED if seen["findings"] else 0
