"""What torch's clip_grad_norm_ and gradclip do on split models, and what they send.

`python -m benchmarks.sharded --page docs/sharded.md` runs every case on four processes,
for p = 1, 2, 3 and infinity, in the layouts that the tests train in.
"""

import argparse
import functools
import math
import os
import time
from datetime import date
from pathlib import Path

import torch
from tests import sharded_programs as programs
from torch.distributed.tensor.debug import CommDebugMode

import gradclip as gc
from benchmarks.page import put_between
from gradclip.torch import Clipper, layout

MARKS = "<!-- written by python -m benchmarks.sharded -->", "<!-- end -->"
WORLD = 4
LIMIT = 20
"""Seconds that processes wait for each other before a case counts as hanging."""
SHARE = 0.1
"""What is left of the gradients where the clip is right."""
ORDERS = [1.0, 2.0, 3.0, math.inf]
CASES = {
    "DDP": "ddp",
    "FSDP2, 1-D": "rows",
    "FSDP2, 2-D (HSDP)": "hybrid",
    "TP, columns": "column",
    "TP, rows": "row",
    "TP, columns and rows": "tensor",
    "TP, sequence parallel": "sequence",
    "FSDP2 over TP": "both",
    "PP, two stages": "pipeline",
    "PP, stages under FSDP2": "pipeline-rows",
    "EP, two experts": "experts",
    "FSDP1": "fsdp1",
    "FSDP1, use_orig_params=False": "fsdp1-flat",
}
SCOPES = ["all", "tensor", "unit", "element", "verify"]
LABELS = {scope: f'`"{scope}"`' for scope in SCOPES}
LABELS |= {"verify": '`"all"`, `verify=True`', "torch": "torch's function"}


def ours(net, kind, limit, p):
    split = programs.declared(kind, WORLD)
    clipper = Clipper(net, gc.Norm(limit, p=p), split_over=split, doctor=())
    return clipper.clip_().norm


def theirs(net, kind, limit, p):
    return torch.nn.utils.clip_grad_norm_(net.parameters(), limit, p)


def outcome(clip, rank, kind, p):
    """Clip to a share of the true norm; return how far off scale and number are."""
    net, alone = programs.sharded_net(kind, WORLD), programs.whole_net(kind)
    for model in (net, alone):
        x = programs.batch(1, WORLD)
        programs.backward(model, x, rank, WORLD, kind, model is net)
    flat = torch.cat([q.grad.flatten().double() for q in alone.parameters()])
    true = float(torch.linalg.vector_norm(flat, p))
    before = lengths(net)
    number = float(clip(net, kind, SHARE * true, p).detach())
    scales = [a / b for a, b in zip(lengths(net), before, strict=True) if b]
    apart = max((abs(scale / SHARE - 1) for scale in scales), default=0.0)
    return {"scale": apart, "number": abs(number / true - 1)}


def lengths(net):
    """Return the norm of each gradient, whole where it knows its other parts."""
    grads = (programs.whole(q.grad) for q in net.parameters() if q.grad is not None)
    return [float(torch.linalg.vector_norm(g.double())) for g in grads]


def attempt(rank, world, kind, orders, folder):
    """Try orders of the norm until one breaks the group; note each before the next."""
    found = {}
    for p in orders:
        for name, clip in (("ours", ours), ("theirs", theirs)):
            began = time.monotonic()
            try:
                found[name, p] = outcome(clip, rank, kind, p)
            except Exception as error:
                hung = time.monotonic() - began > 0.9 * LIMIT
                said = f"{type(error).__name__}: {error}"
                found[name, p] = {"hung": hung, "error": said}
            torch.save(found, f"{folder}/{rank}.part")
            os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
            if "error" in found[name, p] and not all_raised(world, (name, p), folder):
                os._exit(0)
    torch.distributed.barrier()
    os._exit(0)


def all_raised(world, case, folder):
    """Return whether no process waits for another, so that they can go on together.

    A process that raises stays alive until the others have said what became of them:
    its end would wake those that hang.
    """
    paths = [Path(folder, f"{rank}.pt") for rank in range(world)]
    end = time.monotonic() + 2 * LIMIT
    while time.monotonic() < end:
        found = [torch.load(p).get(case) for p in paths if p.exists()]
        if len(found) == world and all(found):
            return all(x.get("hung") is False for x in found)
        time.sleep(0.5)
    return False


def outcomes(kind):
    """Return what every process found, by side and order of the norm."""
    found, left = {}, list(ORDERS)
    while left:
        ranks, _ = programs.start_and_lose(WORLD, attempt, kind, left, timeout=LIMIT)
        for p in list(left):
            for side in ("ours", "theirs"):
                every = [r[side, p] for r in ranks if (side, p) in r]
                if every:
                    found[side, p] = every
        done = [p for p in left if ("theirs", p) in found]
        # Without progress the first of them has broken even the reporting.
        left = [p for p in left if p not in (done or left[:1])]
    return found


def said(every):
    """Return one cell: right, wrong by so much, raises or hangs."""
    if not every:
        return "hangs"
    hung = [i for i, x in enumerate(every) if x.get("hung")]
    errors = {i: x["error"] for i, x in enumerate(every) if "error" in x}
    raised = {i: e.partition(":")[0] for i, e in errors.items() if i not in hung}
    if raised and hung:
        ranks = ", ".join(map(str, raised))
        return f"rank {ranks} raises `{min(raised.values())}`, others hang"
    if errors:
        return "hangs" if hung else f"raises `{min(raised.values())}`"
    scale, number = (max(x[key] for x in every) for key in ("scale", "number"))
    if scale > 1e-5:
        return f"**wrong by {scale:.0%}**"
    return "right" if number < 1e-5 else f"right, but shows {number:.0%} off"


def errors(found):
    """Return what was raised, each once."""
    every = (x.get("error", "") for ranks in found.values() for x in ranks)
    return sorted({error[:200] for error in every if error})


def cases():
    """Yield the table of cases."""
    yield "| model | p = 1 | p = 2 | p = 3 | p = ∞ | gradclip, all p: worst |"
    yield "|---|---|---|---|---|---|"
    for label, kind in CASES.items():
        found = outcomes(kind)
        cells = [said(found.get(("theirs", p), [])) for p in ORDERS]
        mine = [found.get(("ours", p), []) for p in ORDERS]
        verdicts = {said(every) for every in mine}
        worst = max(
            (max(x.values()) for e in mine for x in e if "scale" in x), default=1
        )
        shown = f"right: {worst:.0e}" if verdicts == {"right"} else "; ".join(verdicts)
        print(label, cells, shown, *errors(found), sep="\n  ", flush=True)
        yield f"| {label} | {' | '.join(cells)} | {shown} |"


def counted(rank, world):
    """Count messages and bytes of one clip, for more and more tensors."""
    grid, found = programs.meshes(world)["grid"], {}
    for count in (10, 100, 1000):
        params = [programs.piece(i + 1.0, grid) for i in range(count)]
        for scope in SCOPES:
            over = "all" if scope == "verify" else scope
            verify = scope == "verify"
            rule = gc.Norm(0.5, over=over)
            clipper = Clipper(params, rule, doctor=(), verify=verify)
            found[scope, count] = traffic(clipper.clip_)
        clip = functools.partial(torch.nn.utils.clip_grad_norm_, params, 0.5)
        with CommDebugMode() as counter:
            clip()
        found["torch", count] = counter.get_total_counts(), 0
    return found


def traffic(clip):
    """Return how many messages a clip takes, and how many bytes go into them."""
    sizes, gather = [], layout.Group.gather

    def noting(group, row):
        sizes.append(row.numel() * row.element_size())
        return gather(group, row)

    layout.Group.gather = noting
    with CommDebugMode() as counter:
        clip()
    layout.Group.gather = gather
    return counter.get_total_counts(), sum(sizes)


def messages():
    """Yield the table of messages and bytes."""
    found = programs.start(WORLD, counted)[0]
    yield "| one clip of | 10 tensors | 100 tensors | 1000 tensors |"
    yield "|---|---|---|---|"
    for scope in [*SCOPES, "torch"]:
        cells = []
        for count in (10, 100, 1000):
            number, size = found[scope, count]
            cells.append(f"{number}" + (f", {size} bytes" if size else ""))
        yield f"| {LABELS.get(scope, scope)} | {' | '.join(cells)} |"


def main():
    """Run the cases that were asked for, and print or write the tables."""
    parser = argparse.ArgumentParser(prog="benchmarks.sharded")
    parser.add_argument(
        "--page", type=Path, help="a page whose tables are written anew"
    )
    parser.add_argument("--only", help="one case, as in the table")
    asked = parser.parse_args()
    if asked.only:
        kind = CASES[asked.only]
        CASES.clear()
        CASES[asked.only] = kind
    lines = [
        f"One run of {date.today().isoformat()}: torch {torch.__version__}, gloo, "
        f"{WORLD} processes, which count as hanging after {LIMIT} seconds.",
        "",
        *cases(),
        "",
        "Messages and bytes that one process sends, on a 2 × 2 mesh that cuts every "
        "tensor in both dimensions (`CommDebugMode`):",
        "",
        *messages(),
    ]
    if asked.page:
        put_between(asked.page, MARKS, lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
