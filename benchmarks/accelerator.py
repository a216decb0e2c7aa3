"""What is asked of clipping on a GPU: speed, no waiting, no memory, and graphs.

`python -m benchmarks.accelerator --page docs/benchmarks.md` writes the table of the GPU
it runs on. With `--device cpu` the same lines run on a few small tensors, to see that
they do; that measures nothing, and is not written anywhere.
"""

import argparse
import contextlib
import warnings
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gradclip as gc
from benchmarks.page import put_between, reached
from benchmarks.shapes import GPT2
from benchmarks.timing import alternate
from gradclip.torch import Clipper, attach, clip_grad_norm_, get_total_norm

MARKS = "<!-- written by python -m benchmarks.accelerator -->", "<!-- end -->"
SMALL = [(64, 32), (64,), (32, 64), (32,)]
RULES = {
    "Norm": gc.Norm(0.5),
    "Norm, each tensor": gc.Norm(0.5, over="tensor"),
    "Norm, each unit": gc.Norm(0.5, over="unit"),
    "Value": gc.Value(1e-3),
    "Normalize": gc.Normalize(),
    "Relative": gc.Relative(),
    "Percentile": gc.Percentile(q=50.0, window=20),
    "ZScore": gc.ZScore(warmup=3),
    "EMA": gc.EMA(warmup=3),
    "RMS": gc.RMS(1e-4),
    "Moment": gc.Moment(warmup=3),
    "Stabilize": gc.Stabilize(),
    "Skip": gc.Skip(gc.Norm(0.5)),
}
reference = torch.nn.utils.clip_grad_norm_


def gpt2(width, layers):
    """Return the shapes of a GPT-2; of that with 124 million elements, `GPT2`."""
    scaled = [tuple(n * width // 768 if n % 768 == 0 else n for n in s) for s in GPT2]
    return scaled[:2] + scaled[2:14] * layers + scaled[-2:]


class Device:
    """Where it runs, and how to wait for it."""

    def __init__(self, name):
        """Take the sizes that are asked for on a GPU, and small ones elsewhere."""
        self.name, self.real = name, name == "cuda"
        self.models = {"124M": gpt2(768, 12), "1.5B": gpt2(1600, 48)}
        self.models = self.models if self.real else dict.fromkeys(self.models, SMALL)

    def wait(self):
        """Wait until all is done."""
        if self.real:
            torch.cuda.synchronize()

    def done(self, call):
        """Return a call that ends when its work is done."""
        return lambda: (call(), self.wait())

    def parameters(self, shapes, dtype):
        """Return parameters with gradients of a thousandth, made where they lie."""
        torch.manual_seed(0)
        made = {"device": self.name, "dtype": dtype}
        params = [torch.nn.Parameter(torch.full(s, 0.02, **made)) for s in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, **made).mul_(1e-3)
        return params

    @contextlib.contextmanager
    def forbidding_waits(self):
        """Let whatever makes the host wait raise."""
        if not self.real:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def functions(device, rounds):
    """Time `clip_grad_norm_` against torch's where it clips, and where it does not."""
    for dtype in (torch.float32, torch.bfloat16):
        params = device.parameters(device.models["124M"], dtype)
        grads = [p.grad for p in params]
        given = [g.clone() for g in grads]

        def refill(_, grads=grads, given=given):
            torch._foreach_copy_(grads, given)
            device.wait()

        for kind, limit in (("free", 1e9), ("cut", 1e-3)):
            sides = {
                "torch": lambda x=limit, ps=params: reference(ps, x),
                "ours": lambda x=limit, ps=params: clip_grad_norm_(ps, x),
            }
            sides = {name: device.done(call) for name, call in sides.items()}
            times = alternate(sides, rounds, refill)
            ratio = times["torch"] / times["ours"]
            yield f"{kind}: 124M {told(dtype)}", ratio, ">= 1", times


def overheads(device, rounds):
    """Time fused steps with `attach`, with torch's clip before them, and bare.

    The sides share parameters and state: three models of 1.5 billion do not fit.
    """
    for name, shapes in device.models.items():
        for dtype in (torch.float32, torch.bfloat16):
            params = device.parameters(shapes, dtype)
            grads = [p.grad for p in params]
            given = [g.clone() for g in grads]
            bare, ours = (
                torch.optim.AdamW(params, lr=1e-6, fused=True) for _ in range(2)
            )
            ours.state = bare.state
            attach(ours, gc.Norm(1e-3), doctor=())

            def before(_, grads=grads, given=given):
                torch._foreach_copy_(grads, given)
                device.wait()

            def clipped_before(params=params, step=bare.step):
                reference(params, 1e-3)
                step()

            sides = {"bare": bare.step, "torch": clipped_before, "ours": ours.step}
            sides = {side: device.done(call) for side, call in sides.items()}
            times = alternate(sides, rounds, before)
            theirs = times["torch"] - times["bare"]
            ratio = (times["ours"] - times["bare"]) / theirs
            what = f"attach overhead: AdamW fused, {name} {told(dtype)}"
            yield what, ratio, "<= 0.5", times


def bandwidth(device, rounds):
    """Compare the norm with a copy, which moves each byte twice."""
    for dtype in (torch.float32, torch.bfloat16):
        grads = [p.grad for p in device.parameters(device.models["124M"], dtype)]
        flat = torch.cat([g.flatten() for g in grads])
        other = torch.empty_like(flat)
        sides = {
            "copy": lambda x=flat, y=other: y.copy_(x),
            "ours": lambda gs=grads: get_total_norm(gs),
        }
        sides = {name: device.done(call) for name, call in sides.items()}
        times = alternate(sides, rounds)
        share = times["copy"] / 2 / times["ours"]
        yield f"share of the copy bandwidth, {told(dtype)}", share, ">= 0.8", times


def waits(device, rounds):
    """Count what makes the host wait: rules in a clipper, and in a fused step."""
    found = []
    for name, rule in RULES.items():
        params = device.parameters(SMALL, torch.float32)
        optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
        clipper = Clipper(params, rule, doctor=())
        attach(optimizer, rule, doctor=())
        # The first step makes memories, and state of the optimizer.
        optimizer.step()
        clipper.clip_()
        for kind, call in (("clip_", clipper.clip_), ("attach", optimizer.step)):
            try:
                with device.forbidding_waits():
                    call()
            except RuntimeError as error:
                found.append(f"{kind} {name}: {str(error).splitlines()[0]}")
    for line in found:
        print(line)
    yield f"calls that wait, of {2 * len(RULES)}", len(found), "<= 0", {}


def graphs(device, rounds):
    """Count rules that do something else when a graph is replayed."""
    found = []
    for name, rule in RULES.items():
        sides = [device.parameters(SMALL, torch.float32) for _ in range(2)]
        given = [p.grad.clone() for p in sides[0]]
        clippers = [Clipper(params, rule, doctor=()) for params in sides]
        replay = captured(device, clippers[0], given)
        for step in range(8):
            for params in sides:
                for p, g in zip(params, given, strict=True):
                    p.grad.copy_(g * 1.5 ** (step % 3))
            # The first steps make memories, which a graph goes on with.
            first = clippers[0].clip_ if step < 3 else replay
            first()
            clippers[1].clip_()
        pairs = zip(*sides, strict=True)
        if not all(torch.allclose(a.grad, b.grad, rtol=1e-5) for a, b in pairs):
            found.append(name)
    print("differ in a graph:", ", ".join(found) or "none")
    yield f"rules that differ in a graph, of {len(RULES)}", len(found), "<= 0", {}


def captured(device, clipper, given):
    """Return what replays one clip; it is recorded when it is first called."""
    if not device.real:
        return clipper.clip_
    graph = torch.cuda.CUDAGraph()
    recorded = []

    def replay():
        if not recorded:
            with torch.cuda.graph(graph):
                clipper.clip_()
            recorded.append(True)
        graph.replay()

    return replay


def memory(device, rounds):
    """Measure by how much the clip of a gigabyte raises the peak."""
    for dtype in (torch.float32, torch.bfloat16):
        count = (1 << 30) // dtype.itemsize if device.real else 1 << 10
        params = device.parameters([(count // 4,)] * 4, dtype)
        clip_grad_norm_(params, 1e9)
        grown = 0.0
        if device.real:
            device.wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            clip_grad_norm_(params, 1e-3)
            device.wait()
            grown = (torch.cuda.max_memory_allocated() - before) / (1 << 20)
        yield f"memory in MB: 1 GB of {told(dtype)}", grown, "<= 8", {}


def told(dtype):
    """Return the name of a type without the library."""
    return str(dtype).removeprefix("torch.")


def main():
    """Run all, print the table, and write it where that was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.accelerator")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries the lines without.")
    if asked.page and asked.device == "cpu":
        parser.error("what was tried on a CPU measures nothing, and is not written.")
    warnings.simplefilter("ignore", UserWarning)
    device, rows = Device(asked.device), []
    for group in (waits, graphs, memory, bandwidth, functions, overheads):
        for what, ratio, target, times in group(device, asked.rounds):
            good = "yes" if reached(ratio, target) else "no"
            shown = ", ".join(f"{name} {value:.3g} ms" for name, value in times.items())
            rows.append((what, f"{ratio:.3g}", target, good, shown))
    heads = "what", "measured", "wanted", "reached", "medians"
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    if asked.page:
        card = torch.cuda.get_device_name()
        lines = [
            f"One run of {date.today().isoformat()}: {card}, torch {torch.__version__},"
            f" CUDA {torch.version.cuda}, medians of {asked.rounds} rounds.",
            "",
            f"| {' | '.join(heads)} |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
        put_between(asked.page, MARKS, lines)


if __name__ == "__main__":
    main()
