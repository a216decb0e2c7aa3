"""What runs in every process of a test of split parameters, and how it is started."""

import faulthandler
import functools
import logging
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradclip as gc
from gradclip.integrations.tracking import Tracked
from gradclip.rules import stages
from gradclip.torch import (
    Clipper,
    Pieces,
    attach,
    clip_grad_norm_,
    dtensors,
    get_total_norm,
    layout,
    placement,
)
from gradclip.torch import whole as gathered_state
from table import EVERYWHERE

TIMEOUT = 480
GROUP_TIMEOUT = 90
CPU = torch.device("cpu")
# Every process has the whole tensor here, so that nothing has to be sent.
spread = functools.partial(distribute_tensor, src_data_rank=None)


def _enter(rank, world, folder, program, given, timeout=GROUP_TIMEOUT):
    # A process that hangs says where, and ends.
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    torch.manual_seed(0)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    try:
        result = program(rank, world, *given)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(world, program, *given):
    """Run a program in several processes; return what each of them returned."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _enter,
            (world, folder, program, given),
            nprocs=world,
            join=False,
            start_method="spawn",
        )
        while not context.join(timeout=TIMEOUT + 30):
            alive = [p for p in context.processes if p.is_alive()]
            if len(alive) == world:
                for p in alive:
                    p.kill()
                raise TimeoutError(f"{program.__name__} hangs on {world} processes")
        saved = [Path(folder, f"{rank}.pt") for rank in range(world)]
        return [torch.load(path, weights_only=False) for path in saved]


def start_and_lose(world, program, *given, timeout=GROUP_TIMEOUT):
    """Run a program of which processes may die; return results and exit codes.

    The program saves its results itself, in a folder that is its last argument.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _enter,
            (world, folder, program, (*given, folder), timeout),
            nprocs=world,
            join=False,
            start_method="spawn",
        )
        for p in context.processes:
            p.join(TIMEOUT)
            p.kill()
            p.join()
        paths = [Path(folder, f"{rank}.pt") for rank in range(world)]
        found = [torch.load(p, weights_only=False) for p in paths if p.exists()]
        return found, [p.exitcode for p in context.processes]


def placed(full, mesh, placements, grad_placements=None):
    """Return a DTensor parameter of ones with a gradient, given whole."""
    weight = spread(torch.ones_like(full), mesh, placements)
    p = torch.nn.Parameter(weight)
    p.grad = spread(full.clone(), mesh, grad_placements or placements)
    return p


def plain(full):
    p = torch.nn.Parameter(torch.ones_like(full))
    p.grad = full.clone()
    return p


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


@functools.cache
def meshes(world):
    shapes = {"line": (world,), "grid": (2, world // 2), "cube": (2, world // 2, 1)}
    return {
        name: init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))
        for name, shape in shapes.items()
    }


def gradients(count=6, shape=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    shapes = [(5, 3), (1, 3), (4, 6), (7,), (3, 2, 4), (8, 4)]
    return [
        torch.randn(shape or shapes[i % 6], generator=generator).to(dtype) * (i + 1)
        for i in range(count)
    ]


def layouts(world):
    """Return parameters in every layout, as functions of six whole gradients."""
    m = meshes(world)
    line, grid, cube = m["line"], m["grid"], m["cube"]
    sub = grid["a"]

    def each(*places):
        def make(grads):
            pairs = zip(grads, places, strict=True)
            return [plain(g) if at is None else placed(g, *at) for g, at in pairs]

        return make

    s0, s1, copy = Shard(0), Shard(1), Replicate()
    return {
        "rows": each(*[(line, [s0])] * 6),
        "columns": each(*[(line, [s1 if i != 3 else s0]) for i in range(6)]),
        "copies": each(*[(line, [copy])] * 6),
        "hybrid": each(*[(grid, [copy, s0])] * 6),
        "twice": each(*[(grid, [s0, s0])] * 6),
        "crossed": each(*[(grid, [s0, s1 if i != 3 else s0]) for i in range(6)]),
        "cube": each(*[(cube, [s0, copy, s0])] * 6),
        "partial": each(*[(line, [copy], [copy])] * 5, (line, [copy], [copy])),
        "beside": each((line, [s0]), None, (line, [s1]), None, (line, [copy]), None),
        "mixed": each(
            (line, [s0]),
            (grid, [s0, copy]),
            (grid, [s0, s1]),
            None,
            (sub, [s0]),
            (cube, [copy, s0, copy]),
        ),
    }


def make_partial(params, world):
    """Turn gradients of copies into sums that are not carried out yet."""
    for p in params:
        local = p.grad.to_local() / world
        p.grad = DTensor.from_local(local, p.device_mesh, [Partial()])


def error(params, expected):
    pairs = zip(params, expected, strict=True)
    return max(
        float(((whole(p.grad) - e).abs() / e.abs().max().clamp(1e-30)).max())
        for p, e in pairs
    )


def every_layout(rank, world):
    """Clip in every layout and order of the norm; return what came out."""
    found = {}
    for name, make in layouts(world).items():
        for order in (0.5, 1.0, 2.0, 3.0, math.inf):
            for dtype in (torch.float32, torch.float64):
                grads = gradients(dtype=dtype)
                params = make(grads)
                if name == "partial":
                    make_partial(params, world)
                counter = CommDebugMode()
                with counter:
                    norm = clip_grad_norm_(params, 0.5, order)
                flat = torch.cat([g.flatten().double() for g in grads])
                true = torch.linalg.vector_norm(flat, order)
                expected = [(g.double() * (0.5 / true)).to(dtype) for g in grads]
                found[name, order, dtype] = {
                    "norm": norm,
                    "true": float(true),
                    "error": error(params, expected),
                    "messages": messages(counter),
                    "again": get_total_norm([p.grad for p in params], order),
                }
    return found


def messages(counter):
    """Return how many messages there were, those of gradients themselves aside."""
    counts = {str(k): n for k, n in counter.get_comm_counts().items()}
    return sum(n for name, n in counts.items() if "gather" in name)


def extremes(rank, world):
    """Measure what overflows, underflows or is not a number, on one process only."""
    line = meshes(world)["line"]
    found = {}
    for value in (1e20, 2e38, 1e-30, math.nan, math.inf):
        full = torch.zeros(world, 3)
        full[world - 1, 0] = value
        full[0, 1] = value if math.isfinite(value) else 1.0
        for order in (1.0, 2.0, math.inf):
            params = [placed(full, line, [Shard(0)])]
            norm = clip_grad_norm_(params, math.inf, order)
            true = torch.linalg.vector_norm(full.double(), order)
            # In float64, where float32 cannot hold it.
            found[str(value), order] = norm.double(), true
    return found


COUNTS = {4: (10, 100), 2: (10, 100, 1000 if EVERYWHERE else 300)}


def messages_by_count(rank, world):
    """Count messages for more and more tensors."""
    grid, found = meshes(world)["grid"], {}
    for count in COUNTS[world]:
        params = [piece(i + 1.0, grid) for i in range(count)]
        for scope in ("all", "tensor", "unit", "element", "moment", "verify"):
            verify = scope == "verify"
            rule = gc.Moment()
            if scope != "moment":
                rule = gc.Norm(0.5, over="all" if verify else scope)
            clipper = Clipper(params, rule, doctor=(), verify=verify)
            with CommDebugMode() as counter:
                clipper.clip_()
            found[scope, count] = messages(counter)
    return found


def piece(value, mesh):
    """Return a parameter cut both ways; quicker than cutting a whole one."""
    at = [Shard(0), Shard(1)]
    weight, grad = torch.ones(2, 2), torch.full((2, 2), value)
    p = torch.nn.Parameter(DTensor.from_local(weight, mesh, at, run_check=False))
    p.grad = DTensor.from_local(grad, mesh, at, run_check=False)
    return p


SCOPED = {
    "tensor": lambda: gc.Norm(0.5, over="tensor"),
    "tensor-p1": lambda: gc.Norm(0.5, over="tensor", p=1.0),
    "tensor-inf": lambda: gc.Norm(0.5, over="tensor", p=math.inf),
    "unit": lambda: gc.Norm(0.5, over="unit"),
    "unit-last": lambda: gc.Norm(0.5, over="unit", axis=-1),
    "agc": lambda: gc.Relative(0.01),
    "agc-last": lambda: gc.Relative(0.01, axis=-1),
    "agc-tensor": lambda: gc.Relative(0.01, over="tensor"),
    "element": lambda: gc.Norm(0.5, over="element"),
    "value": lambda: gc.Value(0.5),
    "sign": lambda: gc.Normalize(1.0, over="element"),
    "normalize": lambda: gc.Normalize(1.0, over="unit"),
    "smooth": lambda: gc.Smooth(0.5, over="unit"),
    "ema": lambda: gc.EMA(1.05, warmup=1),
    "groups": lambda: gc.by_name({"*": gc.Norm(1.0)}),
    "moment": lambda: gc.Moment(0.5, warmup=1, corrected=True),
    "peak": lambda: gc.chain(gc.Peak(0.5), gc.Norm(0.4, over="tensor")),
    "chain": lambda: gc.chain(gc.Norm(0.5, over="unit"), gc.Norm(0.7)),
    "chain-tensor": lambda: gc.chain(gc.Norm(0.5, over="tensor"), gc.Value(0.1)),
}


def every_scope(rank, world):
    """Clip by every kind of rule, and compare with the same rule on whole tensors."""
    found = {}
    for name, make in layouts(world).items():
        for kind, rule in SCOPED.items():
            grads = gradients()
            params, alone = make(grads), [plain(g) for g in grads]
            ours, theirs = (Clipper(ps, rule(), doctor=()) for ps in (params, alone))
            for _ in range(2):
                info, expected = ours.clip_(), theirs.clip_()
            found[name, kind] = {
                "error": error(params, [p.grad for p in alone]),
                "flags": (bool(info.finite), bool(info.clipped), bool(info.kept)),
                "expected": tuple(
                    map(bool, (expected.finite, expected.clipped, expected.kept))
                ),
                "norm": None if first_over(rule()) == "unit" else info.norm,
                "true": expected.norm,
            }
    return found


def first_over(rule):
    return stages(rule)[0].over


def policies(rank, world):
    """Put a NaN, or nothing, where one process has its part; see who does what."""
    line, found = meshes(world)["line"], {}
    for kind in ("nan", "copy", "missing", "none"):
        for policy in ("skip", "zero", "raise", "ignore"):
            for name, rule in SCOPED.items():
                found[kind, policy, name] = fault(rank, world, line, kind, policy, rule)
    return found


def fault(rank, world, line, kind, policy, rule):
    full = torch.ones(world, 4)
    params = [placed(full, line, [at]) for at in (Shard(0), Shard(1), Replicate())]
    params += [plain(full)]
    if rank == world - 1:
        if kind == "nan":
            params[0].grad.to_local()[0, 0] = math.nan
        elif kind == "copy":
            params[2].grad.to_local()[0, 0] = math.nan
        else:
            for p in params[1:] if kind == "missing" else params:
                p.grad = None
    clipper = Clipper(params, rule(), on_nonfinite=policy, doctor=())
    try:
        info = clipper.clip_()
    except gc.NonFiniteError as error:
        return str(error)
    return tuple(map(bool, (info.finite, info.clipped, info.kept)))


def callers(rank, world):
    """Clip what only the caller knows to be split; return ours and what is right."""
    return (
        {f"stages {k}": v for k, v in stages_of_pipeline(rank, world).items()}
        | {f"experts {k}": v for k, v in experts(rank, world).items()}
        | {f"beside {k}": v for k, v in experts_beside(rank, world).items()}
        | {f"slices {k}": v for k, v in slices(rank, world).items()}
        | {f"crossed {k}": v for k, v in crossed(rank, world).items()}
    )


def stages_of_pipeline(rank, world):
    """Each process has other tensors, and another number of them; one is tied."""
    tied = torch.full((2, 2), 3.0)
    everything = [
        torch.full((r + 2,), r + 1.0) for r in range(world) for _ in range(r + 1)
    ]
    flat = torch.cat([t.flatten() for t in [*everything, tied]])
    total = torch.linalg.vector_norm(flat)
    own = torch.full((rank + 2,), rank + 1.0)
    mine = [(f"own.{i}", plain(own)) for i in range(rank + 1)]
    if rank in (0, world - 1):
        mine.append(("tied", plain(tied)))

    def split(name, p):
        return None if name == "tied" else dist.group.WORLD

    clipper = Clipper(mine, gc.Norm(0.5), split_over=split, verify=True)
    found = {"norm": (float(clipper.clip_().norm), float(total))}
    largest = max(float(torch.linalg.vector_norm(t)) for t in [*everything, tied])
    for limit, kept in ((largest * 1.01, True), (largest * 0.99, False)):
        for _, p in mine:
            p.grad = (
                None
                if p.shape == (1,)
                else p.detach() * 0 + (3.0 if p.dim() == 2 else rank + 1.0)
            )
        rule = gc.Skip(gc.Norm(limit, over="tensor"))
        info = Clipper(mine, rule, split_over=split, doctor=()).clip_()
        found[f"kept {kept}"] = bool(info.kept), kept
    return found


def experts(rank, world):
    """The experts differ, the dense weights are the same everywhere."""
    dense, own = (
        torch.full((3, 3), 2.0),
        [torch.full((4,), r + 1.0) for r in range(world)],
    )
    flat = torch.cat([dense.flatten(), *own])
    found = {}
    for order in (1.0, 2.0, 3.0, math.inf):
        params = {"dense": plain(dense), "expert": plain(own[rank])}
        clipper = Clipper(
            params,
            gc.Norm(0.5, p=order),
            split_over=is_expert,
            verify=True,
        )
        true = float(torch.linalg.vector_norm(flat, order))
        found[f"norm {order}"] = float(clipper.clip_().norm), true
        after = params["dense"].grad[0, 0].item() / 2, params["expert"].grad[0].item()
        found[f"dense {order}"] = after[0], 0.5 / true
        found[f"expert {order}"] = after[1] / (rank + 1), 0.5 / true
    return found


def experts_beside(rank, world):
    """Experts, not as many on each process, beside a layer that lies in rows on it."""
    # As in real programs, not the very object that belongs to the mesh.
    group = dist.new_group(list(range(world)))
    line = meshes(world)["line"]
    lots = {
        "dtensor": (placed(torch.ones(world, 2), line, [Shard(0)]), None),
        "slices": (plain(torch.ones(1, 2)), Pieces(dist.group.WORLD, 0)),
    }
    found = {}
    for kind, (dense, way) in lots.items():
        params = {"dense": dense}
        for i in range(1 + (rank == 1)):
            params[f"expert{rank}.{i}"] = plain(torch.full((2,), 3.0 + rank + i))

        def split(name, p, way=way):
            return group if "expert" in name else way

        rule = gc.Norm(1.0, over="tensor")
        info = Clipper(params, rule, split_over=split, verify=True).clip_()
        norms = [math.sqrt(2) * (3.0 + rank + i) for i in range(1 + (rank == 1))]
        for i, true in enumerate([math.sqrt(2 * world), *norms]):
            found[f"{kind} {i}"] = float(info.norm[i]), true
        for name in list(params)[1:]:
            found[f"{kind} {name}"] = float(params[name].grad.norm()), 1.0
    return found


def slices(rank, world):
    """Plain tensors are slices of larger ones, as in Megatron's layers."""
    wholes = {"columns": torch.randn(8, 4), "rows": torch.randn(4, 8)}
    wholes |= {"bias": torch.randn(8), "norm": torch.randn(4)}
    cut = {"columns": 0, "rows": 1, "bias": 0}
    found = {}
    for name, rule in SCOPED.items():
        if "last" in name:
            continue
        parts = {
            n: plain(t.chunk(world, cut[n])[rank].contiguous() if n in cut else t)
            for n, t in wholes.items()
        }
        alone = {n: plain(t) for n, t in wholes.items()}

        def split(n, p):
            return Pieces(dist.group.WORLD, cut[n]) if n in cut else None

        Clipper(parts, rule(), split_over=split, doctor=(), verify=True).clip_()
        Clipper(alone, rule(), doctor=()).clip_()
        for n, p in alone.items():
            full = p.grad.chunk(world, cut[n])[rank] if n in cut else p.grad
            found[f"{name} {n}"] = float((parts[n].grad - full).abs().max()), 0.0
    return found


def disagreeing(rank, world):
    """Copies of one layer of which one has gone wrong, beside pieces, in stages."""
    grid = meshes(world)["grid"]
    stages_of, pieces_of = grid.get_group("a"), grid.get_group("b")

    def split(name, p):
        return [Pieces(pieces_of, 0), stages_of] if name == "up" else stages_of

    found = {}
    for scope in ("all", "tensor"):
        for kind, factor in (("nan", math.nan), ("drift", 1 + 1e-6)):
            params = {"up": plain(torch.ones(3, 2)), "norm": plain(torch.ones(4))}
            params["free"] = plain(torch.ones(2))
            if rank == 1:
                params["norm"].grad *= factor
            rule = gc.ZScore(warmup=1, over=scope)
            clipper = Clipper(params, rule, split_over=split, doctor=())
            info = clipper.clip_()
            mean = tagged(clipper.state_dict(), "0.mean")
            found[scope, kind] = info.norm, info.finite, info.kept, mean
    return found


def tagged(state, name):
    """Return what is saved under a name, whatever stands behind it."""
    return next(x for key, x in state.items() if key.partition("@")[0] == name)


def without_rows(rank, world):
    """A chain over rows, of which the last process has none; then an empty list."""
    layers = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    net = torch.nn.Sequential(*layers) if rank else torch.nn.Sequential(layers[0])
    for p in net.parameters():
        torch.nn.init.ones_(p)
        p.grad = None if rank == world - 1 else torch.ones_like(p)
    rule = gc.chain(gc.AGC(0.01), gc.Norm(1.0))
    clipper = Clipper(net, rule, split_over=dist.group.WORLD, doctor=())
    infos = [clipper.clip_() for _ in range(2)]
    mine = [] if rank == world - 1 else [torch.ones(4)]
    total = get_total_norm(mine, split_over=dist.group.WORLD)
    return [(x.limit, x.scale, x.norm_after) for x in infos], float(total)


def outcome(call):
    """Return what a call returns, or its error."""
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def told(call):
    """Return what a call says in a warning or an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except ValueError as error:
            return str(error)
    return " ".join(str(w.message) for w in caught)


def scaled(scaler):
    """Take a step with a loss scaler, of parameters that others have, too."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    attach(optimizer, gc.Norm(1e9), split_over=dist.group.WORLD)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)


def sentences(rank, world):
    """What is said where a clip of split parameters could only be wrong."""
    mesh = meshes(world)["line"]
    flat = FullyShardedDataParallel(Trial(0), device_id=CPU)
    wide = torch.nn.Linear(4, 2 * world)
    fully_shard(wide, mesh=mesh)
    submeshes = [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1])]
    apart = {
        str(i): placed(torch.ones(2), m, [Shard(0)]) for i, m in enumerate(submeshes)
    }
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 2)
    groups = gc.by_name({"bias": None, "*": gc.AGC(0.1)})
    scopes = gc.by_name({"bias": gc.Norm(1.0, over="tensor"), "*": gc.AGC(0.1)})
    return {
        "flattened": told(lambda: Clipper(flat, gc.Norm(1.0, over="tensor"))),
        "flattened groups": told(
            lambda: Clipper(flat, gc.by_name({"*": gc.Norm(1.0)}))
        ),
        "flattened all": told(lambda: Clipper(flat, gc.Norm(1.0))),
        "no gradient": told(Clipper(wide, gc.Norm(1.0)).clip_),
        "submeshes": told(lambda: Clipper(apart, gc.Norm(1.0))),
        "meta": told(lambda: Clipper(empty, gc.Norm(1.0))),
        "a free group": told(lambda: Clipper(wide, groups)),
        "units beside others": told(lambda: Clipper(wide, scopes)),
        "a lone scaler": told(lambda: scaled(torch.amp.GradScaler("cpu"))),
        "a shared scaler": told(
            lambda: scaled(ShardedGradScaler("cpu", process_group=dist.group.WORLD))
        ),
    }


def verified_units(rank, world):
    """Rows that are as many as parameters, on a process whose rows are not others'."""
    net = torch.nn.Linear(4, world)
    fully_shard(net, mesh=meshes(world)["line"])
    for p in net.parameters():
        p.grad = torch.ones_like(p.detach())
        p.grad.to_local().mul_(1 + rank)
    Clipper(net, gc.AGC(0.1), doctor=(), verify=True).clip_()
    return True


class Trial(torch.nn.Module):
    """A dense layer and an expert, whose numbers a test chooses."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(0)
        self.dense = torch.nn.Linear(4, 4)
        torch.manual_seed(seed)
        self.expert = torch.nn.Linear(4, 2)

    def learn(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=generator)
        self.expert(self.dense(x)).square().sum().backward()
        return self


def trial(rank, sync=True, own=False):
    """Return a model after backward: with an expert of its own, synchronised or not."""
    model = Trial(seed=rank if own else 1).learn(seed=rank + 5)
    for p in model.parameters() if sync else ():
        if not (own and any(p is q for q in model.expert.parameters())):
            dist.all_reduce(p.grad)
    return model


def trial_under_ddp(rank):
    """Return a model whose gradients DDP has not reduced yet."""
    model = torch.nn.parallel.DistributedDataParallel(Trial(1))
    with model.no_sync():
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))
        model.module.expert(model.module.dense(x)).square().sum().backward()
    return model


def trial_of_stages(rank):
    """Return the one of two stages of a pipeline that belongs to this process."""
    model = trial(rank)
    return torch.nn.ModuleDict(
        {"late": model.expert} if rank else {"early": model.dense}
    )


def trial_beside(rank, world):
    """Return a norm layer whose copies were not summed, beside a layer in rows."""
    line = meshes(world)["line"]
    layer = placed(torch.arange(4.0 * world).view(-1, 2), line, [Shard(0)])
    norm = torch.nn.Parameter(
        DTensor.from_local(torch.ones(3), line, [Replicate()], run_check=False)
    )
    uneven = torch.tensor([1.0, 2.0, 3.0 + rank])
    norm.grad = DTensor.from_local(uneven, line, [Replicate()], run_check=False)
    return {"layer": layer, "norm": norm}


def is_expert(name, p):
    return dist.group.WORLD if "expert" in name else None


def by_rank(rank):
    """Declare the group on the first process only."""
    return is_expert if rank == 0 else None


def misuses(rank, world):
    """Return, for each misuse, a function that clips."""
    everyone = dist.group.WORLD
    nan = trial(rank)
    for p in nan.parameters():
        p.grad.fill_(math.nan)
    late = trial(rank, sync=False)
    behind = Clipper(trial(rank), gc.ZScore(1.0, warmup=1), doctor=(), verify=True)
    behind.clip_()
    if rank == world - 1:
        behind.load_state_dict(behind.state_dict() | {"0.mean": torch.tensor(9.0)})

    def clipping(params, rule=None, **options):
        def clip():
            clipper = Clipper(
                params, rule or gc.Norm(0.5), doctor=(), verify=True, **options
            )
            return clipper.clip_()

        return params, clip

    def stepping(model, **options):
        def step():
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            options.update(model=model, doctor=(), verify=True)
            attach(optimizer, gc.Norm(0.5), **options)
            optimizer.step()

        return model, step

    return {
        "replica: all": stepping(trial(rank), split_over=everyone),
        "replica: dense": clipping(trial(rank, own=True), split_over=everyone),
        "sync: ddp": stepping(trial_under_ddp(rank)),
        "sync: function": (late, lambda: verified_function(late)),
        "sync: beside": clipping(trial_beside(rank, world)),
        "group: experts": clipping(trial(rank, own=True)),
        "group: stages": stepping(trial_of_stages(rank)),
        "group: one side": clipping(trial(rank, own=True), split_over=by_rank(rank)),
        "limit": clipping(trial(rank), gc.Norm(0.5 + rank)),
        "limits": clipping(trial(rank), gc.Norm(0.5 + rank, over="tensor")),
        "memory": ({}, behind.clip_),
        "refusal": clipping(nan, on_nonfinite="raise" if rank else "skip"),
        "right": clipping(trial(rank)),
        "right: experts": clipping(trial(rank, own=True), split_over=is_expert),
        "right: ddp": stepping(trial(rank)),
        "right: nothing": stepping(Trial(1)),
    }


def ordered(rank, world):
    """Name groups of stages and of experts in both orders; one stage has experts."""
    half = world // 2
    pp = [dist.new_group([i, half + i]) for i in range(half)][rank % half]
    lots = range(half), range(half, world)
    ep = [dist.new_group(list(ranks)) for ranks in lots][rank // half]
    found = {}
    for name, groups in {"ep, pp": (ep, pp), "pp, ep": (pp, ep)}.items():
        params = {f"dense{rank // half}": plain(torch.full((2,), 1.0 + rank // half))}
        if rank >= half:
            params["expert"] = plain(torch.full((2,), 1.0 + rank))

        def split(name, p, groups=groups):
            return groups if name == "expert" else groups[groups[0] is ep]

        def clip(params=params, split=split):
            clipper = Clipper(params, gc.Norm(1.0), split_over=split, verify=True)
            return float(clipper.clip_().norm)

        found[name] = outcome(clip)
    return found


def elsewhere(rank, world):
    """Compare in a group that not all processes are in; return what each is told."""
    first, p = dist.new_group([0]), plain(torch.ones(2))
    clipper = functools.partial(Clipper, [p], gc.Norm(1.0), verify=first)
    return outcome(lambda: float(clipper().clip_().norm))


def verified_function(model):
    return clip_grad_norm_(model.parameters(), 0.5, verify=True)


def verified(rank, world):
    """Clip in every wrong way; return what is said, and whether something changed."""
    found = {}
    for name, (model, clip) in misuses(rank, world).items():
        params = list(model.values() if isinstance(model, dict) else model.parameters())
        before = [local(p.grad) for p in params], [local(p) for p in params]
        said = None
        try:
            clip()
        except RuntimeError as error:
            said = f"{type(error).__name__}: {error}"
        after = [local(p.grad) for p in params], [local(p) for p in params]
        found[name] = said, same(before[0], after[0]), same(before[1], after[1])
    return found


def local(t):
    return None if t is None else dtensors.local_of(t.detach()).clone()


def same(before, after):
    return all(a is b or torch.equal(a, b) for a, b in zip(before, after, strict=True))


def crossed(rank, world):
    """Two stages of a pipeline, each cut in rows over its own processes."""
    grid = meshes(world)["grid"]
    stage = grid.get_local_rank("a")
    full = [torch.randn(5, 3), torch.randn(3, 7)]
    params = [placed(full[stage], grid["b"], [Shard(0)])]
    if stage == 1:
        params.append(placed(torch.ones(3), grid["b"], [Replicate()]))
    stages_of = grid.get_group("a")
    clipper = Clipper(params, gc.Norm(0.5), split_over=stages_of, verify=True)
    flat = torch.cat([*(t.flatten() for t in full), torch.ones(3)])
    return {
        "norm": (float(clipper.clip_().norm), float(torch.linalg.vector_norm(flat)))
    }


class WideLinear(torch.nn.Linear):
    """A layer that computes in float64, whatever its parameters and gradients are."""

    def forward(self, x):
        weight, bias = self.weight.double(), self.bias.double()
        return torch.nn.functional.linear(x.double(), weight, bias)


class WideLayerNorm(torch.nn.LayerNorm):
    """As `WideLinear`: what is summed in another order is then equal in float32."""

    def forward(self, x):
        weight, bias = self.weight.double(), self.bias.double()
        return torch.nn.functional.layer_norm(
            x.double(), self.normalized_shape, weight, bias, self.eps
        )


class Net(torch.nn.Module):
    def __init__(self, wide=False):
        super().__init__()
        torch.manual_seed(3)
        linear = WideLinear if wide else torch.nn.Linear
        self.up = linear(6, 10)
        self.norm = (WideLayerNorm if wide else torch.nn.LayerNorm)(10)
        self.down = linear(10, 3)

    def forward(self, x):
        return self.down(self.norm(torch.tanh(self.up(x)))).clone()


class Stage(torch.nn.Module):
    """One of two stages of a pipeline, made of the layers of `Net`."""

    def __init__(self, net, last):
        super().__init__()
        if last:
            self.norm, self.down = net.norm, net.down
        else:
            self.up = net.up

    def forward(self, x):
        if hasattr(self, "up"):
            return torch.tanh(self.up(x))
        return self.down(self.norm(x)).clone()


class Experts(torch.nn.Module):
    """A dense layer and two experts that take tokens in turn; all of them, or one."""

    def __init__(self, group=None, wide=False):
        super().__init__()
        torch.manual_seed(3)
        linear = WideLinear if wide else torch.nn.Linear
        self.dense, self.group = linear(6, 10), group
        experts = {str(i): linear(10, 3) for i in range(2)}
        mine = experts if group is None else [str(group.rank())]
        self.experts = torch.nn.ModuleDict({i: experts[i] for i in mine})

    def forward(self, x):
        h = torch.tanh(self.dense(x))
        if self.group is not None:
            h = Entering.apply(h, self.group)
        out = h.new_zeros(len(h), 3)
        for i, expert in self.experts.items():
            tokens = torch.arange(int(i), len(h), 2)
            out = out.index_copy(0, tokens, expert(h[tokens]))
        return out if self.group is None else Leaving.apply(out, self.group)


class Entering(torch.autograd.Function):
    """What every expert receives: its gradients are summed over them."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Leaving(torch.autograd.Function):
    """What the experts return: the sum of it goes on everywhere."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def batch(step, world):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2 * world, 6, generator=generator) * (30 if step == 7 else 1)


def whole_net(kind, wide=False):
    return Experts(wide=wide) if kind == "experts" else Net(wide)


def declared(kind, world):
    """Return what `split_over` has to say about a kind of model."""
    group = meshes(world)["grid"].get_group("a")
    if kind == "experts":
        return lambda name, p: group if "experts" in name else None
    return group if "pipeline" in kind else None


def pipeline(kind, net, grid):
    """Return the stage of this process, cut in rows over its own processes or not."""
    last = grid.get_local_rank("a")
    stage = Stage(net, last)
    if kind == "pipeline-rows":
        fully_shard(stage, mesh=grid["b"])
    part = PipelineStage(stage, last, 2, CPU, group=grid.get_group("a"))
    stage.schedule = ScheduleGPipe(
        part, n_microbatches=2, loss_fn=lambda y, _: y.square().mean()
    )
    return stage


def sharded_net(kind, world, wide=False):
    net, m = Net(wide), meshes(world)
    if kind == "experts":
        return Experts(m["grid"].get_group("a"), wide)
    if "pipeline" in kind:
        return pipeline(kind, net, m["grid"])
    mesh = m["grid"] if kind == "hybrid" else m["line"]
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(net)
    if kind == "fsdp1":
        return FullyShardedDataParallel(net, use_orig_params=True, device_id=CPU)
    if kind == "fsdp1-flat":
        return FullyShardedDataParallel(net, use_orig_params=False, device_id=CPU)
    if kind in ("column", "row", "tensor", "both"):
        plan = {}
        if kind != "row":
            plan["up"] = ColwiseParallel(output_layouts=Replicate())
        if kind != "column":
            plan["down"] = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(net, m["grid"]["b"] if kind == "both" else mesh, plan)
        mesh = m["grid"]["a"]
    if kind == "sequence":
        plan = {"norm": SequenceParallel(sequence_dim=0)}
        plan["up"] = ColwiseParallel(output_layouts=Shard(0), use_local_output=False)
        plan["down"] = ColwiseParallel(
            input_layouts=Shard(0), output_layouts=Replicate()
        )
        parallelize_module(net, mesh, plan)
    if kind in ("column", "row", "tensor", "sequence"):
        return net
    options = {}
    if kind == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if kind == "precision":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in (net.up, net.down):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


SPLIT_DATA = {"rows", "hybrid", "offload", "precision", "accumulate", "both", "ddp"}
SPLIT_DATA |= {"fsdp1", "fsdp1-flat"}
KINDS = [*sorted(SPLIT_DATA), "tensor", "sequence"]
KINDS += ["pipeline", "pipeline-rows", "experts"]


GRIDS = {"hybrid", "both", "pipeline", "pipeline-rows", "experts"}
"""What two processes are too few for: two of them in each of two directions."""


def training(rank, world):
    """Train twenty steps on split and on whole parameters; return how far they part."""
    cases, found = [("SGD", False, p) for p in (1.0, 3.0, math.inf)], {}
    for kind in KINDS:
        # Torch has no fused AdamW for DTensors beside tensors, and no such SGD at all.
        adamw = "AdamW", kind not in ("tensor", "sequence"), 2.0
        for case in [adamw, *cases[-orders(kind, world) :]]:
            found[("wide", kind, *case)] = train(rank, world, kind, *case, wide=True)
        if world > 2:
            continue
        # Layers as they are: their own rounding, in another order, comes on top of it.
        for case in (adamw, cases[-1]):
            found[("plain", kind, *case)] = train(rank, world, kind, *case)
        torch.set_default_dtype(torch.float64)
        found[("float64", kind, *cases[-1])] = train(rank, world, kind, *cases[-1])
        torch.set_default_dtype(torch.float32)
    return found


def orders(kind, world):
    """Return for how many orders of the norm SGD is tried; AdamW has the usual one."""
    return 3 if world == 2 or (EVERYWHERE and kind in GRIDS) else 1


def train(rank, world, kind, name, fused, order, wide=False):
    """Train a split model and a whole one; return how far norms and gradients part."""
    nets = sharded_net(kind, world, wide), whole_net(kind, wide)
    rule, make = gc.Norm(0.2, p=order), getattr(torch.optim, name)
    both = [make(n.parameters(), lr=0.05, fused=fused) for n in nets]
    # Once in each kind of model nothing has to be found wrong for twenty steps.
    ours = {"split_over": declared(kind, world), "verify": name == "AdamW"}
    clippers = [
        attach(o, rule, model=n, **(ours if n is nets[0] else {}))
        for o, n in zip(both, nets, strict=True)
    ]
    beside = Beside(kind, rule) if wide else None
    found = dict.fromkeys(("norm", "grads", "drift", "apart", "clipped"), 0.0)
    for step in range(20):
        x = batch(step, world)
        for n, optimizer in zip(nets, both, strict=True):
            optimizer.zero_grad()
            backward(n, x, rank, world, kind, n is nets[0])
        if beside:
            beside.clip(nets[0], x)
        for optimizer in both:
            optimizer.step()
        norms = [float(clipper.info.norm) for clipper in clippers]
        note(found, "drift", abs(norms[0] / norms[1] - 1))
        if beside:
            note(found, "norm", abs(norms[0] / beside.norm - 1))
            note(found, "grads", beside.distance(nets[0]))
        found["clipped"] += float(clippers[0].info.clipped)
    right = dict(nets[1].named_parameters())
    for n, p in gathered(nets[0], kind, nets[1], "data").items():
        note(found, "apart", float((p - right[n]).detach().abs().max()))
    return found


class Beside:
    """A whole model that starts each step from the parameters of the split one.

    What rounding did in the steps before is not counted again.
    """

    def __init__(self, kind, rule):
        self.kind, self.model = kind, whole_net(kind, wide=True)
        self.clipper = Clipper(self.model, rule, doctor=())

    def clip(self, net, x):
        """Clip the gradients of the same step, before the split model takes it."""
        self.model.load_state_dict(gathered(net, self.kind, self.model, "data"))
        self.model.zero_grad()
        if self.kind == "precision":
            # The network is rounded to bfloat16 here, and only the clip is compared.
            grads = gathered(net, self.kind, self.model, "grad")
            for n, p in self.model.named_parameters():
                p.grad = grads[n].clone()
        else:
            self.model(x).square().mean().backward()
        self.norm = float(self.clipper.clip_().norm)

    def distance(self, net):
        """Return the largest difference of gradients here, over the largest element."""
        right = {n: p.grad for n, p in self.model.named_parameters()}
        if self.kind.startswith("fsdp1"):
            mine = gathered(net, self.kind, self.model, "grad")
        else:
            mine = {
                n.removeprefix("module."): p.grad for n, p in net.named_parameters()
            }
        assert mine.keys() <= right.keys()
        far = [far_from(right[n], g) for n, g in mine.items() if g is not None]
        return max(far) / max(float(g.abs().max()) for g in right.values())


def far_from(right, mine):
    """Return the largest difference of what is here of a tensor."""
    if isinstance(mine, DTensor):
        mesh, placements = mine.device_mesh, mine.placements
        right = spread(right, mesh, placements)
        mine, right = mine.to_local(), right.to_local()
    return float((mine - right).abs().max()) if mine.numel() else 0.0


def note(found, key, value):
    found[key] = max(found[key], value)


def gathered(net, kind, model, what):
    """Return all parameters or gradients of a split model, whole, by name."""
    named = ((n, getattr(p, what)) for n, p in net.named_parameters())
    mine = {n.removeprefix("module."): whole(t) for n, t in named if t is not None}
    if not kind.startswith(("fsdp1", "pipeline", "experts")):
        return mine
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if "fsdp1" not in kind:
        return {n: t for part in every for n, t in part.items()}
    flat = torch.cat([t.flatten() for part in every for t in part.values()])
    shapes = {n: p.shape for n, p in model.named_parameters()}
    parts = flat[: sum(map(math.prod, shapes.values()))].split(
        [math.prod(shape) for shape in shapes.values()]
    )
    return {n: t.view(shapes[n]) for n, t in zip(shapes, parts, strict=True)}


def backward(net, x, rank, world, kind, ours):
    """Run backward on the part of the data that is this process's, or on all of it."""
    parts = world // 2 if kind == "both" else world
    if kind == "both":
        parts, rank = 2, rank // (world // 2)
    if not ours:
        return net(x).square().mean().backward()
    if "pipeline" in kind:
        return through_stages(net, x, kind, world)
    if kind not in SPLIT_DATA:
        return net(x).square().mean().backward()
    x = x.chunk(parts)[rank]
    if kind != "accumulate":
        return net(x).square().mean().backward()
    for i, piece in enumerate(x.chunk(2)):
        net.set_requires_gradient_sync(i == 1)
        (net(piece).square().mean() / 2).backward()
    return None


def through_stages(net, x, kind, world):
    """Run backward through both stages, on all of the data or on a part."""
    grid = meshes(world)["grid"]
    if kind == "pipeline-rows":
        x = x.chunk(world // 2)[grid.get_local_rank("b")]
    if grid.get_local_rank("a") == 0:
        return net.schedule.step(x)
    return net.schedule.step(target=torch.zeros(len(x), 3))


class Run:
    """A training run that can be saved, lost and gone on with."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world
        self.net = sharded_net("rows", world)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05, fused=True)
        rule = gc.Percentile(30.0)
        self.clipper = attach(self.optimizer, rule, model=self.net, doctor=())

    def steps(self, first, last):
        """Train; yield the norm and the limit of each step."""
        for step in range(first, last):
            self.optimizer.zero_grad()
            x = batch(step, self.world)
            backward(self.net, x, self.rank, self.world, "rows", True)
            self.optimizer.step()
            yield float(self.clipper.info.norm), float(self.clipper.info.limit)

    def state(self):
        net, optimizer = get_state_dict(self.net, self.optimizer)
        return {"net": net, "optimizer": optimizer, "clip": self.clipper.state_dict()}

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.net,
            self.optimizer,
            model_state_dict=state["net"],
            optim_state_dict=state["optimizer"],
        )
        self.clipper.load_state_dict(state["clip"])


def losing_one(rank, world, folder, results):
    """Train twice: whole, then until the last process is killed in a step."""
    whole = list(Run(rank, world).steps(0, 12))
    run = Run(rank, world)
    before = list(run.steps(0, 6))
    dcp.save(run.state(), checkpoint_id=f"{folder}/run")
    before += run.steps(6, 8)
    if rank == world - 1:
        # Between backward and the clip, for which the others wait.
        layout.Group.gather = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        list(run.steps(8, 9))
    except RuntimeError as error:
        said = repr(error)
    else:
        said = "nothing"
    waited = time.monotonic() - began
    torch.save((whole, before, said, waited), f"{results}/{rank}.pt")
    os._exit(0)


def going_on(rank, world, folder):
    """Go on from the checkpoint of a run that was lost."""
    run = Run(rank, world)
    run.load(f"{folder}/run")
    return list(run.steps(6, 12))


RULES = {
    "zscore": lambda: gc.ZScore(2.0, warmup=10),
    "ema": lambda: gc.EMA(1.05, warmup=10),
    "percentile": lambda: gc.Percentile(50.0, window=20),
    "deviation": lambda: gc.Deviation(3.0, window=20, warmup=5),
    "skip": lambda: gc.Skip(gc.ZScore(4.0, warmup=10)),
}


def adaptive(rank, world, folder=None):
    """Feed rules 300 steps, some spoilt on one process only; return their memory."""
    found = {}
    for name, rule in RULES.items():
        params = [torch.ones(world, 3), torch.ones(2, 5), torch.ones(3)]
        line = meshes(world)["line"]
        at = [Shard(0)], [Shard(1)], [Replicate()]
        params = [placed(t, line, a) for t, a in zip(params, at, strict=True)]
        clipper = Clipper(params, rule(), doctor=())
        for step in range(300):
            spoil(params, step, rank, world)
            clipper.clip_()
        found[name] = clipper.state_dict()
        if folder:
            dcp.save(found[name], checkpoint_id=f"{folder}/{name}")
    return found


INSIDE = {
    "moment": lambda: gc.Moment(2.0, decay=0.9, warmup=2),
    "corrected": lambda: gc.Moment(2.0, decay=0.9, warmup=1, corrected=True),
    "peak": lambda: gc.Peak(0.8),
    "chain": lambda: gc.chain(
        gc.Norm(5.0, over="tensor"), gc.Moment(1.5, warmup=1, corrected=True)
    ),
}


INSIDE_ON = {2: list(INSIDE), 4: list(INSIDE) if EVERYWHERE else ["moment", "chain"]}
"""Which of these are tried in every layout."""


def elements(rank, world):
    """Clip by rules with a memory of elements, beside the same on whole tensors."""
    found = {}
    for name, make in layouts(world).items():
        for kind in INSIDE_ON[world]:
            found[name, kind] = follow(make, INSIDE[kind]())
    for kind, rule in INSIDE.items():
        found["gone on", kind] = go_on(layouts(world), rule())
    return found


def growing(count):
    """Yield gradients of steps: one element has a spike, then all, and some are 0."""
    generator = torch.Generator().manual_seed(11)
    for step in range(count):
        grads = [torch.randn(g.shape, generator=generator) for g in gradients()]
        grads[2][1, 1] *= 50 if step == 4 else 1
        if step == 7:
            grads = [g * 20 for g in grads]
        if step == 3:
            grads[0].zero_()
        yield grads


def follow(make, rule):
    grads = gradients()
    params, alone = make(grads), [plain(g) for g in grads]
    ours, theirs = (Clipper(ps, rule, doctor=()) for ps in (params, alone))
    found = {"error": 0.0, "reports": 0.0, "clipped": 0}
    for grads in growing(9):
        give(params, grads), give(alone, grads)
        info, expected = ours.clip_(), theirs.clip_()
        want = [p.grad for p in alone]
        found["error"] = max(found["error"], error(params, want))
        for name in ("norm", "limit", "scale", "norm_after"):
            a, b = getattr(info, name), getattr(expected, name)
            if bool((b < math.inf).all()):
                far = float(((a - b).abs() / b.abs().clamp(1e-30)).max())
                found["reports"] = max(found["reports"], far)
        assert bool(info.clipped) == bool(expected.clipped)
        found["clipped"] += int(info.clipped)
    saved, right = ours.state_dict(), theirs.state_dict()
    assert saved.keys() == right.keys()
    found["memory"] = max(
        float((whole(saved[k]) - x).abs().max()) for k, x in right.items()
    )
    return found


def give(params, grads):
    """Give parameters gradients that are laid out as they are."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
        if isinstance(p, DTensor):
            p.grad = spread(g.clone(), p.device_mesh, p.placements)


def go_on(layouts, rule):
    """Save a memory in one layout, go on in another and on whole tensors."""
    grads, makes = gradients(), [layouts[n] for n in ("rows", "columns", "mixed")]
    lots = [make(grads) for make in makes] + [[plain(g) for g in grads]]
    clippers = [Clipper(params, rule, doctor=()) for params in lots]
    for grads in growing(6):
        give(lots[0], grads)
        clippers[0].clip_()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        dcp.save(clippers[0].state_dict(), checkpoint_id=folder[0])
        for clipper in clippers[1:]:
            state = clipper.state_dict()
            dcp.load(state, checkpoint_id=folder[0])
            clipper.load_state_dict(state)
        dist.barrier()
    # What one process saved whole is taken to pieces as well.
    clippers[2].load_state_dict(clippers[3].state_dict())
    worst = 0.0
    for grads in growing(9):
        for params, clipper in zip(lots, clippers, strict=True):
            give(params, grads)
            clipper.clip_()
        want = [whole(p.grad) for p in lots[3]]
        worst = max(worst, *(error(params, want) for params in lots))
    return worst if worst > 1e-6 else 0


def one_file(rank, world):
    """Save by one process, and load on all: a part in the file, and the whole."""
    params = layouts(world)["rows"](gradients())
    clipper = Clipper(params, INSIDE["moment"](), doctor=())
    for grads in growing(4):
        give(params, grads)
        clipper.clip_()
    state = clipper.state_dict()
    every = gathered_state(state)
    alike = placed(torch.ones(3), meshes(world)["line"], [Replicate()])
    copies = Clipper([alike], INSIDE["moment"](), doctor=())
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        if rank == 0:
            saved = state, every, copies.state_dict()
            torch.save(saved, f"{folder[0]}/state.pt")
        dist.barrier()
        part, loaded, copied = torch.load(f"{folder[0]}/state.pt", weights_only=False)
        dist.barrier()
    again = Clipper(params, INSIDE["moment"](), doctor=())
    refusal = told(lambda: again.load_state_dict(part))
    untouched = int(again.state_dict()["step"]) == 0
    again.load_state_dict(loaded)
    now = again.state_dict()
    optimizer = torch.optim.SGD(params, lr=0.1)
    tracked = Tracked(optimizer, INSIDE["moment"](), doctor=())
    return {
        "copies": told(lambda: copies.load_state_dict(copied)),
        "trainer": told(lambda: tracked.check_unsplit("do this")),
        "refusal": refusal,
        "untouched": untouched,
        "plain": all(type(x) is torch.Tensor for x in loaded.values()),
        "same": all(torch.equal(local(now[k]), local(x)) for k, x in state.items()),
    }


def plain_pieces(rank, world):
    """Save a memory of plain pieces by one process, and load it on all."""
    found = {}
    laid_flat = lay_flat(Net())
    p = torch.nn.Parameter(torch.ones(2, 3))
    lots = {
        "fsdp1": (laid_flat, {}),
        "pieces": ([p], {"split_over": lambda *_: Pieces(dist.group.WORLD, 0)}),
    }
    for kind, (params, options) in lots.items():
        clipper = Clipper(params, gc.Moment(2.0, warmup=2), doctor=(), **options)
        for _ in range(3):
            for q in clipper.params:
                q.grad = torch.randn(q.shape) * (rank + 1)
            clipper.clip_()
        with tempfile.TemporaryDirectory() as own:
            folder = [own]
            dist.broadcast_object_list(folder)
            again = Clipper(params, gc.Moment(2.0, warmup=2), doctor=(), **options)
            # Of one shape and under one name, the pieces would look like copies.
            dcp.save({"c": clipper}, checkpoint_id=folder[0])
            dcp.load({"c": again}, checkpoint_id=folder[0])
            state = [clipper.state_dict()]
            dist.broadcast_object_list(state)
            dist.barrier()
        mine = clipper.state_dict()
        optimizer = torch.optim.SGD(clipper.params)
        model = None if kind == "pieces" else params
        tracked = Tracked(optimizer, clipper.rule, model=model, doctor=(), **options)
        found[kind] = {
            "refusal": told(lambda: again.load_state_dict(state[0])),  # noqa: B023
            "whole": told(lambda: gathered_state(mine)),  # noqa: B023
            "trainer": told(lambda: tracked.check_unsplit("do this")),  # noqa: B023
            "file": told(tracked.state_dict),
            "own": all(torch.equal(again.state_dict()[k], x) for k, x in mine.items()),
        }
        found[kind]["norms"] = list(Clipper(params, gc.EMA(), **options).state_dict())
    return found


def stage_memories(rank, world):
    """Save what rules remember of the tensors of a stage, and load it again."""
    own, tied = [f"w{rank}"], ["norm", "embedding"]
    names = own + tied if rank else tied + own
    return {
        rule.kind: stage_memory(
            rank, {name: plain(torch.ones(2)) for name in names}, rule
        )
        for rule in (gc.EMA(1.0, warmup=1), gc.Moment(warmup=1))
    }


def stage_memory(rank, params, rule):
    """Return what becomes of the memory of one rule; tied weights are in all stages."""

    def split(name, p):
        return dist.group.WORLD if name.startswith("w") else None

    clipper, again = (Clipper(params, rule, doctor=(), split_over=split) for _ in "ab")
    for _ in range(3):
        for i, p in enumerate(params.values()):
            p.grad = torch.ones_like(p) * (1 + 9 * rank + i)
        clipper.clip_()
    with tempfile.TemporaryDirectory() as folder_here:
        folder = [folder_here]
        dist.broadcast_object_list(folder)
        dcp.save({"c": clipper}, checkpoint_id=folder[0])
        dcp.load({"c": again}, checkpoint_id=folder[0])
        state = [clipper.state_dict()]
        dist.broadcast_object_list(state)
        dist.barrier()
    mine, loaded = clipper.state_dict(), again.state_dict()
    return {
        "own": all(torch.equal(loaded[k], x) for k, x in mine.items()),
        "names": sorted(mine),
        "refusal": told(lambda: again.load_state_dict(state[0])),
    }


def some(rank, world):
    """Record a model that the last two processes have; return its lines on each."""
    group = dist.new_group([world - 2, world - 1])
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        path = Path(folder[0], "run.jsonl")
        if rank >= world - 2:
            p = plain(torch.ones(3))
            with gc.History(path) as history:
                Clipper([p], gc.Norm(1.0), history=history, verify=group).clip_()
        dist.barrier()
        found = path.read_text().count("\n") if path.exists() else 0
        dist.barrier()
    return found


def apart(pairs):
    return max(float((whole(p) - q).detach().abs().max()) for p, q in pairs)


def borrowing(rank, world):
    """Clip by the memory of AdamW, on split and on whole parameters."""
    rule = gc.Moment(2.0, warmup=1, corrected=True, memory="optimizer")
    found = {}
    for fused in (False, True):
        grads = gradients()
        lots = layouts(world)["rows"](grads), [plain(g) for g in grads]
        both = [torch.optim.AdamW(ps, lr=0.05, fused=fused) for ps in lots]
        clippers = [attach(o, rule, doctor=()) for o in both]
        clipped = 0
        for grads in growing(9):
            for params, optimizer in zip(lots, both, strict=True):
                give(params, grads)
                optimizer.step()
            clipped += int(clippers[0].info.clipped)
        pairs = zip(*lots, strict=True)
        found[fused] = apart(pairs), clipped
    return found


def spoil(params, step, rank, world):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(step * 10 + i)
        full = torch.randn(p.shape, generator=generator)
        p.grad = spread(full, p.device_mesh, p.placements)
    hurt = params[step % 2].grad.to_local()
    if rank == step % world and hurt.numel():
        if step % 17 == 5:
            hurt.view(-1)[0] = 1e6
        if step % 23 == 4:
            hurt.view(-1)[0] = math.nan


def loading(rank, world, folder):
    """Load what another number of processes saved."""
    found = {}
    for name, rule in RULES.items():
        params = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
        clipper = Clipper(params, rule(), doctor=())
        saved = {}
        for key, x in clipper.state_dict().items():
            saved[key] = x
        dcp.load(saved, checkpoint_id=f"{folder}/{name}")
        clipper.load_state_dict(saved)
        found[name] = clipper.state_dict()
    return found


def deterministic(rank, world):
    """Count the steps whose bits differ from those of one process."""
    line, found = meshes(world)["line"], {}
    for dim in (0, 1):
        shapes = [(8, 12), (64, 32), (12, 4)]
        params = [placed(torch.ones(s), line, [Shard(dim)]) for s in shapes]
        alone = [plain(torch.ones(s)) for s in shapes]
        ours, theirs = (
            Clipper(ps, gc.ZScore(1.0, warmup=5), doctor=(), deterministic=True)
            for ps in (params, alone)
        )
        generator, differ = torch.Generator().manual_seed(5), 0
        for _ in range(1000 if EVERYWHERE and world == 4 else 250):
            for p, q in zip(params, alone, strict=True):
                q.grad = torch.randn(q.shape, generator=generator)
                p.grad.to_local().copy_(q.grad.chunk(world, dim)[rank])
            same = torch.equal(ours.clip_().norm, theirs.clip_().norm)
            for p, q in zip(params, alone, strict=True):
                part = q.grad.chunk(world, dim)[rank]
                same &= torch.equal(p.grad.to_local(), part)
            differ += not same
        found[dim] = differ
    return found


def counted_twice(rank, world):
    """Take copies for pieces: what a test has to notice."""
    right, placement._placed = placement._placed, lambda at: layout.Way("piece", 0)
    full = torch.ones(4, 4)
    params = [placed(full, meshes(world)["line"], [Replicate()])]
    norm = clip_grad_norm_(params, 1.0)
    placement._placed = right
    return float(norm)


def said(function, *given):
    try:
        function(*given)
    except ValueError as error:
        return re.sub("such as [^,]*,", "such as one,", str(error))
    return "nothing was said"


def unwrapped(rank, world):
    """Hand over what FSDP's first version has cut, without and with its wrapper."""
    found = {}
    for kind in ("fsdp1", "fsdp1-flat"):
        net = sharded_net(kind, world)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        message = said(attach, optimizer, gc.Norm(1.0))
        assert message == said(clip_grad_norm_, net.parameters(), 1.0)
        found[kind] = message, attach(optimizer, gc.Norm(1.0), net).names
    return found


def lay_flat(module):
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=CPU)


def lay_layers_flat(net):
    """Wrap layers in place, as an automatic wrapper does; the model stays the same."""
    net.up, net.norm = lay_flat(net.up), lay_flat(net.norm)
    net.down = lay_flat(net.down)
    return net


def rewired(optimizer, net):
    """Give an optimizer the parameters that a model has now, as Accelerate does."""
    optimizer.param_groups[0]["params"] = list(net.parameters())


def wrapped_later(rank, world):
    """Make clippers before the model is cut, and return norms or what is said."""
    found, x = {}, batch(0, 1)

    def step(model, clip):
        model(x).square().mean().backward()
        return told(clip)

    for name, wrap in [("root", lay_flat), ("layers", lay_layers_flat)]:
        net = Net()
        clipper = Clipper(net, gc.Norm(0.01), doctor=())
        found[name, "clipper"] = step(wrap(net), clipper.clip_), clipper.info
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        clipper = attach(optimizer, gc.Norm(0.01), net, doctor=())
        found[name, "attached"] = step(wrap(net), optimizer.step), clipper.info
    net = Net()
    clipper = Clipper(net, gc.Moment(2.0), doctor=())
    step(net, clipper.clip_)
    net.zero_grad()
    found["late"] = step(lay_layers_flat(net), clipper.clip_)
    net = Net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}
    attach(optimizers, gc.Norm(0.01), net, in_backward=True)
    one = optimizers[net.down.weight]
    found["in backward"] = step(lay_layers_flat(net), one.step)
    net = Net()
    clipper = Clipper(net, gc.Norm(0.01), doctor=())
    # The layer between them keeps its parameters, and they have gradients.
    for layer in (net.up, net.down):
        fully_shard(layer, mesh=meshes(world)["line"])
    found["replaced"] = step(net, clipper.clip_)
    net = Net()
    clipper = Clipper(list(net.named_parameters()), gc.Norm(0.01), doctor=())
    found["listed"] = step(fully_shard(net, mesh=meshes(world)["line"]), clipper.clip_)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper = attach(optimizer, gc.Norm(0.01), net, doctor=())
    rewired(optimizer, fully_shard(net, mesh=meshes(world)["line"]))
    found["rewired"] = step(net, optimizer.step), clipper.info
    net = Net()
    clipper = Clipper(net, gc.Norm(0.01))
    found["right"] = step(net, clipper.clip_), clipper.info
    return found


PROGRAMS = [
    every_layout,
    extremes,
    messages_by_count,
    every_scope,
    policies,
    callers,
    verified,
    training,
    adaptive,
    elements,
    one_file,
    plain_pieces,
    some,
    borrowing,
    deterministic,
    counted_twice,
    unwrapped,
    wrapped_later,
    disagreeing,
    without_rows,
    sentences,
    ordered,
    elsewhere,
    stage_memories,
    verified_units,
]


def everything(rank, world, folder):
    """Run all programs in processes that are started once."""
    found = {}
    for program in PROGRAMS:
        given = (folder if world == 4 else None,) if program is adaptive else ()
        found[program.__name__] = program(rank, world, *given)
    if world == 2:
        found["loading"] = loading(rank, world, folder)
    else:
        found["going_on"] = going_on(rank, world, folder)
    return found
