"""`make bench`: every ratio that is claimed, as a table and as JSON.

A ratio above 1 is how many times faster gradclip is; overheads are step with clipping
minus step without, over the same for torch's function before the step. The bound of a
ratio is that of a clip which took no longer than reading the bytes once with `sum`, and
multiplying them where that is its work: none can be better on the machine.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import gradclip as gc
from benchmarks import peers
from benchmarks.page import put_between, reached
from benchmarks.shapes import GPT2, SETS, parameters
from benchmarks.timing import alternate
from gradclip.torch import Clipper, attach, clip_grad_norm_

reference = torch.nn.utils.clip_grad_norm_
VECTORS = torch.backends.cpu.get_cpu_capability()
MARKS = f"<!-- written by make bench, {VECTORS} -->", "<!-- end -->"
TARGETS = {
    "free: gpt2": 3.0,
    "free: 2000 of 64": 3.5,
    "free: 400 of 128x128": 1.8,
    "cut: gpt2": 1.4,
    "cut: 2000 of 64": 2.0,
    "cut: 400 of 128x128": 1.2,
}


def passes(params):
    """Return calls that read, and that read and multiply, as many bytes as these."""
    count = sum(p.grad.numel() * p.grad.element_size() for p in params)
    flat = torch.ones(count // 4)

    def both():
        flat.sum()
        flat.mul_(1.0)

    return flat.sum, both


def functions(name, rounds):
    """Time clip_grad_norm_ where nothing is clipped, and where everything is."""
    params = parameters(*SETS[name])
    read, both = passes(params)
    free = alternate(
        {
            "torch": lambda: reference(params, 1e9),
            "ours": lambda: clip_grad_norm_(params, 1e9),
            "bytes": read,
        },
        rounds,
    )
    limit = float(reference(params, math.inf)) / 2
    grads = [p.grad for p in params]
    given = [g.clone() for g in grads]
    cut = alternate(
        {
            "torch": lambda: reference(params, limit),
            "ours": lambda: clip_grad_norm_(params, limit),
            "bytes": both,
        },
        rounds,
        # What was clipped must be again: of bfloat16, a limit only a little lower is
        # one that the last clip, rounded inward, has kept already.
        lambda _: torch._foreach_copy_(grads, given),
    )
    for kind, times in (("free", free), ("cut", cut)):
        what = f"{kind}: {name}"
        target = f">= {TARGETS.get(what, 1.0):g}"
        yield what, times, *over(times, "torch"), target


def over(times, peer, ours="ours"):
    """Return how many times faster than a peer we are, and the bytes alone would be."""
    return times[peer] / times[ours], times[peer] / times["bytes"]


def clippers(name, rounds):
    """Time a clipper with all that it keeps and looks after, where nothing is clipped.

    What it takes beside the norm is the same for any size, and seen in small ones.
    """
    params = parameters(*SETS[name])
    sides = {
        "torch": lambda: reference(params, 1e9),
        "ours": Clipper(params, gc.Norm(1e9)).clip_,
        "bytes": passes(params)[0],
    }
    with warnings.catch_warnings():
        # It never clips, and its doctor says so.
        warnings.simplefilter("ignore")
        times = alternate(sides, rounds)
    yield f"Clipper free: {name}", times, *over(times, "torch"), ">= 1"


def overhead(kind, options, rounds, name="", shapes=GPT2[2:62]):
    """Time a step with attach, with torch's clip before it, and with neither."""
    sides = {}
    for side in ("bare", "torch", "ours"):
        params = parameters(shapes, torch.float32)
        optimizer = getattr(torch.optim, kind)(params, lr=1e-6, **options)
        sides[side] = params, optimizer
    given = [p.grad.clone() for p in sides["bare"][0]]
    attach(sides["ours"][1], gc.Norm(0.1), doctor=())

    def step(side):
        params, optimizer = sides[side]
        if side == "torch":
            reference(params, 0.1)
        optimizer.step()

    def refill(side):
        for p, grad in zip(sides.get(side, sides["bare"])[0], given, strict=True):
            p.grad.copy_(grad)

    fused = bool(options.get("fused"))
    calls = {side: lambda side=side: step(side) for side in sides}
    calls["bytes"] = passes(sides["bare"][0])[not fused]
    times = alternate(calls, rounds, refill)
    ours, theirs = times["ours"] - times["bare"], times["torch"] - times["bare"]
    label = f"attach overhead: {kind} {'fused' if fused else 'foreach'}"
    label, most = (f"{label}, {name}", 1) if name else (label, 0.4 if fused else 0.6)
    target = f"<= {most:g}"
    yield label, times, ours / theirs, times["bytes"] / theirs, target


def rules(rounds):
    """Time the rules that remember against Norm, and against their peers."""
    params = parameters(GPT2, torch.float32)
    made = {
        "Norm": Clipper(params, gc.Norm(1e9), doctor=()),
        "Percentile": Clipper(params, gc.Percentile(100), doctor=()),
        "ZScore": Clipper(params, gc.ZScore(z=1e9), doctor=()),
        "EMA": Clipper(params, gc.EMA(1e9, over="all"), doctor=()),
    }
    sides = {name: clipper.clip_ for name, clipper in made.items()}
    autoclip, zclip = peers.AutoClip(100), peers.ZClip(1e9)
    sides |= {"autoclip": lambda: autoclip(params), "zclip": lambda: zclip(params)}
    sides["bytes"] = passes(params)[0]
    times = alternate(sides, rounds)
    for name in ("Percentile", "ZScore", "EMA"):
        yield f"{name} over Norm", times, times[name] / times["Norm"], None, "<= 1.15"
    for name, peer in (("Percentile", "autoclip"), ("ZScore", "zclip")):
        yield f"{name} against {peer}", times, *over(times, peer, name), ">= 5"


def recording(rounds):
    """Time the clip with a history of every step, and without."""
    params = parameters(GPT2, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        history = gc.History(Path(folder) / "run.jsonl")
        sides = {
            "off": Clipper(params, gc.Norm(1e9), doctor=()).clip_,
            "on": Clipper(params, gc.Norm(1e9), doctor=(), history=history).clip_,
        }
        times = alternate(sides, 5 * rounds)
    yield "recording every step", times, times["on"] / times["off"], None, "<= 1.02"


def cells(rounds):
    """Time AGC and per-tensor clipping against loops over tensors."""
    for name in ("resnet50", "2000 of 64"):
        params = parameters(*SETS[name])
        ours = Clipper(params, gc.Relative(), doctor=())
        sides = {"loop": lambda p=params: peers.agc(p), "ours": ours.clip_}
        times = alternate(sides, rounds)
        yield f"AGC: {name}", times, times["loop"] / times["ours"], None, ">= 2"
        ours = Clipper(params, gc.Norm(1e9, over="tensor"), doctor=())
        sides = {"loop": lambda p=params: peers.per_tensor(p, 1e9), "ours": ours.clip_}
        times = alternate(sides, rounds)
        ratio = times["loop"] / times["ours"]
        yield f"per tensor: {name}", times, ratio, None, ">= 2"


def numpy(name, rounds):
    """Time the array front in place against the obvious NumPy."""
    grads = [p.grad.numpy().copy() for p in parameters(*SETS[name])]
    norm = float(gc.clip(grads, gc.Norm(math.inf))[1].norm)
    limit = [norm]
    flat = np.ones(sum(g.size for g in grads), np.float32)

    def read():
        np.dot(flat, flat)

    def both():
        read()
        np.multiply(flat, np.float32(1), out=flat)

    def lower(_):
        limit[0] *= 0.999

    passes_of_numpy = read, both
    for kind, factor in (("free", 1e9), ("cut", 1.0)):
        sides = {
            "numpy": lambda f=factor: peers.numpy_clip(grads, f * limit[0]),
            "ours": lambda f=factor: gc.clip(grads, gc.Norm(f * limit[0]), out=grads),
        }
        sides["bytes"] = passes_of_numpy[kind == "cut"]
        times = alternate(sides, rounds, lower)
        target = ">= 1.5" if name == "gpt2" else ">= 1"
        yield f"NumPy {kind}: {name}", times, *over(times, "numpy"), target


def bandwidth(rounds):
    """Compare the norm with the quickest way to read as many bytes."""
    params = parameters(*SETS["one of 64M"])
    flat = params[0].grad
    sides = {
        "sum": flat.sum,
        "dot": lambda: torch.dot(flat, flat),
        "ours": lambda: clip_grad_norm_(params, math.inf),
    }
    times = alternate(sides, rounds)
    best = min(times["sum"], times["dot"])
    yield "share of the read bandwidth", times, best / times["ours"], 1.0, ">= 0.8"


def jit(rounds):
    """Time the clip for optax; JAX is loaded only now, after the others were timed."""
    from benchmarks import under_jit

    return under_jit.rows(rounds)


MEMORY = """
import resource, sys, torch
import gradclip as gc
from gradclip.torch import Clipper, clip_grad_norm_
dtype = getattr(torch, sys.argv[1])
count = (1 << 30) // torch.finfo(dtype).bits * 8
p = torch.nn.Parameter(torch.empty(count, dtype=dtype))
p.grad = torch.ones(count, dtype=dtype)
q = torch.nn.Parameter(torch.empty(4, dtype=dtype))
q.grad = torch.ones(4, dtype=dtype)
clip_grad_norm_([q], 0.5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip_grad_norm_([p], 1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory(_):
    """Measure by how much one clip of 1 GB of gradients raises the peak."""
    for dtype in ("float32", "bfloat16", "float64"):
        command = [sys.executable, "-c", MEMORY, dtype]
        grown = int(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
        grown /= 1024
        yield f"memory: 1 GB of {dtype}", {"MB": grown}, grown, None, "<= 8"


GROUPS = {
    "functions": lambda r: (row for name in SETS for row in functions(name, r)),
    "attach": lambda r: (
        row
        for kind, options in (
            ("AdamW", {"fused": True}),
            ("SGD", {"fused": True}),
            ("AdamW", {"foreach": True}),
            ("SGD", {"foreach": True}),
        )
        for row in overhead(kind, options, r)
    ),
    "small": lambda r: (
        row
        for name in ("tiny network", "small network")
        for rows in (
            clippers(name, r),
            overhead("AdamW", {"fused": True}, r, name, SETS[name][0]),
        )
        for row in rows
    ),
    "rules": rules,
    "recording": recording,
    "cells": cells,
    "numpy": lambda r: (
        row for name in ("gpt2", "small network") for row in numpy(name, r)
    ),
    "bandwidth": bandwidth,
    "jit": jit,
    "memory": memory,
}


def shown(bound):
    """Return a bound as text; many rows have none."""
    return "" if bound is None else f"{bound:.2f}"


def write_table(page, facts, results):
    """Put the results between the marks of a page."""
    lines = [
        f"One run of {facts['date']}: torch {facts['torch']}, NumPy {facts['numpy']}, "
        f"{facts['cpus']} CPU cores, {facts['machine']} with {facts['vectors']}, "
        f"medians of {facts['rounds']} rounds.",
        "",
        "| what | ratio | bound | wanted | reached | medians |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        times = ", ".join(f"{name} {value:.3g}" for name, value in row["ms"].items())
        unit = "" if "memory" in row["what"] else " ms"
        cells = row["what"], f"{row['ratio']:.2f}", shown(row["bound"]), row["target"]
        good = "yes" if reached(row["ratio"], row["target"]) else "no"
        lines.append(f"| {' | '.join(cells)} | {good} | {times}{unit} |")
    put_between(page, MARKS, lines)


def main():
    """Run the groups that were asked for, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("groups", nargs="*", default=[], help=", ".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("bench-out/bench.json"))
    parser.add_argument("--page", type=Path, help="a page whose table is written anew")
    asked = parser.parse_args()
    if unknown := set(asked.groups) - set(GROUPS):
        known = ", ".join(GROUPS)
        parser.error(f"unknown: {', '.join(unknown)}; the groups are {known}")
    torch.set_num_threads(os.cpu_count() or 1)
    table = Table("what", "ratio", "bound", "target", "reached", "medians in ms")
    results = []
    for group in asked.groups or GROUPS:
        for what, times, ratio, bound, target in GROUPS[group](asked.rounds):
            good = "yes" if reached(ratio, target) else "no"
            medians = ", ".join(f"{k} {v:.3g}" for k, v in times.items())
            table.add_row(what, f"{ratio:.2f}", shown(bound), target, good, medians)
            results.append(
                {
                    "what": what,
                    "ratio": ratio,
                    "bound": bound,
                    "target": target,
                    "ms": times,
                }
            )
    Console(width=140).print(table)
    facts = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "vectors": VECTORS,
        "rounds": asked.rounds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"facts": facts, "results": results}, indent=2))
    if asked.page:
        write_table(asked.page, facts, results)


if __name__ == "__main__":
    main()
