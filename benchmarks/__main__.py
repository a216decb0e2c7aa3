"""`make bench`: every ratio that is claimed, as a table and as JSON.

A ratio above 1 is how many times faster gradclip is; overheads are step with clipping
minus step without, over the same for torch's function before the step.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import gradclip as gc
from benchmarks import peers
from benchmarks.shapes import GPT2, SETS, parameters
from benchmarks.timing import alternate
from gradclip.torch import Clipper, attach, clip_grad_norm_

reference = torch.nn.utils.clip_grad_norm_
MARKS = "<!-- written by make bench -->", "<!-- end -->"
TARGETS = {
    "free: gpt2": 3.0,
    "free: 2000 of 64": 3.5,
    "free: 400 of 128x128": 1.8,
    "cut: gpt2": 1.4,
    "cut: 2000 of 64": 2.0,
    "cut: 400 of 128x128": 1.2,
}


def functions(name, rounds):
    """Time clip_grad_norm_ where nothing is clipped, and where everything is."""
    params = parameters(*SETS[name])
    limit = [float(reference(params, math.inf))]
    free = alternate(
        {
            "torch": lambda: reference(params, 1e9),
            "ours": lambda: clip_grad_norm_(params, 1e9),
        },
        rounds,
    )

    def lower(_):
        limit[0] *= 0.999

    cut = alternate(
        {
            "torch": lambda: reference(params, limit[0]),
            "ours": lambda: clip_grad_norm_(params, limit[0]),
        },
        rounds,
        lower,
    )
    for kind, times in (("free", free), ("cut", cut)):
        target = TARGETS.get(f"{kind}: {name}", 1.0)
        yield f"{kind}: {name}", times, times["torch"] / times["ours"], f">= {target:g}"


def overhead(kind, options, rounds):
    """Time a step with attach, with torch's clip before it, and with neither."""
    shapes = GPT2[2:62]
    sides = {}
    for name in ("bare", "torch", "ours"):
        params = parameters(shapes, torch.float32)
        optimizer = getattr(torch.optim, kind)(params, lr=1e-6, **options)
        sides[name] = params, optimizer
    given = [p.grad.clone() for p in sides["bare"][0]]
    attach(sides["ours"][1], gc.Norm(0.1), doctor=())

    def step(name):
        params, optimizer = sides[name]
        if name == "torch":
            reference(params, 0.1)
        optimizer.step()

    def refill(name):
        for p, grad in zip(sides[name][0], given, strict=True):
            p.grad.copy_(grad)

    calls = {name: lambda name=name: step(name) for name in sides}
    times = alternate(calls, rounds, refill)
    ours, theirs = times["ours"] - times["bare"], times["torch"] - times["bare"]
    target = 0.4 if options.get("fused") else 0.6
    label = f"attach overhead: {kind} {'fused' if options.get('fused') else 'foreach'}"
    yield label, times, ours / theirs, f"<= {target:g}"


def rules(rounds):
    """Time the rules that remember against Norm, and against their peers."""
    params = parameters(GPT2, torch.float32)
    made = {
        "Norm": Clipper(params, gc.Norm(1e9), doctor=()),
        "Percentile": Clipper(params, gc.Percentile(100), doctor=()),
        "ZScore": Clipper(params, gc.ZScore(z=1e9), doctor=()),
    }
    sides = {name: clipper.clip_ for name, clipper in made.items()}
    autoclip, zclip = peers.AutoClip(100), peers.ZClip(1e9)
    sides |= {"autoclip": lambda: autoclip(params), "zclip": lambda: zclip(params)}
    times = alternate(sides, rounds)
    for name, peer in (("Percentile", "autoclip"), ("ZScore", "zclip")):
        yield f"{name} over Norm", times, times[name] / times["Norm"], "<= 1.15"
        yield f"{name} against {peer}", times, times[peer] / times[name], ">= 5"


def cells(rounds):
    """Time AGC and per-tensor clipping against loops over tensors."""
    for name in ("resnet50", "2000 of 64"):
        params = parameters(*SETS[name])
        ours = Clipper(params, gc.Relative(), doctor=())
        sides = {"loop": lambda p=params: peers.agc(p), "ours": ours.clip_}
        times = alternate(sides, rounds)
        yield f"AGC: {name}", times, times["loop"] / times["ours"], ">= 2"
        ours = Clipper(params, gc.Norm(1e9, over="tensor"), doctor=())
        sides = {"loop": lambda p=params: peers.per_tensor(p, 1e9), "ours": ours.clip_}
        times = alternate(sides, rounds)
        yield f"per tensor: {name}", times, times["loop"] / times["ours"], ">= 2"


def numpy(rounds):
    """Time the array front in place against the obvious NumPy."""
    grads = [p.grad.numpy() for p in parameters(GPT2, torch.float32)]
    norm = float(gc.clip(grads, gc.Norm(math.inf))[1].norm)
    limit = [norm]

    def lower(_):
        limit[0] *= 0.999

    for kind, factor in (("free", 1e9), ("cut", 1.0)):
        sides = {
            "numpy": lambda f=factor: peers.numpy_clip(grads, f * limit[0]),
            "ours": lambda f=factor: gc.clip(grads, gc.Norm(f * limit[0]), out=grads),
        }
        times = alternate(sides, rounds, lower)
        yield f"NumPy {kind}: gpt2", times, times["numpy"] / times["ours"], ">= 1.5"


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
    yield "share of the read bandwidth", times, best / times["ours"], ">= 0.8"


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
        yield f"memory: 1 GB of {dtype}", {"MB": grown / 1024}, grown / 1024, "<= 8"


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
    "rules": rules,
    "cells": cells,
    "numpy": numpy,
    "bandwidth": bandwidth,
    "memory": memory,
}


def reached(ratio, target):
    """Return whether a ratio is on the right side of its target."""
    side, value = target.split()
    return ratio >= float(value) if side == ">=" else ratio <= float(value)


def write_table(page, facts, results):
    """Put the results between the marks of a page."""
    lines = [
        f"One run of {facts['date']}: torch {facts['torch']}, NumPy {facts['numpy']}, "
        f"{facts['cpus']} CPU cores, {facts['machine']}.",
        "",
        "| what | ratio | wanted | reached | medians |",
        "|---|---|---|---|---|",
    ]
    for row in results:
        times = ", ".join(f"{name} {value:.3g}" for name, value in row["ms"].items())
        unit = "" if "memory" in row["what"] else " ms"
        cells = row["what"], f"{row['ratio']:.2f}", row["target"]
        good = "yes" if reached(row["ratio"], row["target"]) else "no"
        lines.append(f"| {' | '.join(cells)} | {good} | {times}{unit} |")
    before, _, rest = page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    table = "\n".join(lines)
    page.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


def main():
    """Run the groups that were asked for, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("groups", nargs="*", default=[], help=", ".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("bench-out/bench.json"))
    parser.add_argument("--page", type=Path, help="a page whose table is written anew")
    asked = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    table = Table("what", "ratio", "target", "reached", "medians in ms")
    results = []
    for group in asked.groups or GROUPS:
        for what, times, ratio, target in GROUPS[group](asked.rounds):
            good = reached(ratio, target)
            shown = ", ".join(f"{k} {v:.3g}" for k, v in times.items())
            table.add_row(what, f"{ratio:.2f}", target, "yes" if good else "no", shown)
            results.append(
                {"what": what, "ratio": ratio, "target": target, "ms": times}
            )
    Console(width=140).print(table)
    facts = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"facts": facts, "results": results}, indent=2))
    if asked.page:
        write_table(asked.page, facts, results)


main()
