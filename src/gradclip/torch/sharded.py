"""Norms of gradients that lie in pieces on several processes.

Every process measures what it has, in float64. Then one vector goes round each process
group, and all processes put the parts together in the order of the ranks, so that the
result is the same everywhere, to the bit. Who takes part follows from the parameters,
never from the gradients: a missing, empty or broken gradient makes nobody wait.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradclip.decision import Info
from gradclip.rules import Rule, Scope, stages
from gradclip.torch.exact import safe_norm
from gradclip.torch.verbs import InPlace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Pieces:
    r"""Says that a plain tensor is a piece of one tensor, cut along a dimension.

    $\lVert t \rVert_p^p = \sum_r \lVert t_r \rVert_p^p$ over the ranks $r$ of a group.

    A bare process group says that its members hold different tensors. For the norm of
    all gradients that is the same, but only pieces have norms of tensors and rows that
    are put together.

    Args:
        group: The processes that hold the pieces.
        dim: The dimension that was cut, at least 0; None for tensors that were laid
            flat before.

    Example:
        >>> from gradclip.torch import Clipper, Pieces
        >>> def split_over(name, p):
        ...     return Pieces(tp_group, dim=1) if name.endswith("proj.weight") else None
    """

    group: "ProcessGroup"
    dim: int | None = 0


Split: TypeAlias = "ProcessGroup | Pieces | Sequence[ProcessGroup | Pieces] | None"
SplitOver: TypeAlias = "ProcessGroup | Callable[[str, Tensor], Split] | None"


@dataclass(frozen=True)
class Way:
    """How a parameter lies on the processes of a group."""

    kind: Literal["piece", "other", "copy"]
    dim: int | None = None


class Group:
    """A process group that norms have to go round."""

    def __init__(self, handle: "ProcessGroup", level: int) -> None:
        """Look up what does not change; level 0 are meshes, the caller's come later."""
        self.handle, self.level, self.size = handle, level, handle.size()

    def gather(self, row: Tensor) -> Tensor:
        """Return the vectors of all processes, as the rows of a matrix."""
        import torch.distributed as dist

        sent = row.to(self._device(row)).contiguous()
        seen = sent.new_empty(self.size * len(sent))
        # Torch 2.13 gave it another name, and warns about the old one.
        name = "all_gather_single"
        gather = getattr(dist, name, None) or dist.all_gather_into_tensor
        gather(seen, sent, group=self.handle)
        return seen.view(self.size, -1).to(row.device)

    def _device(self, row: Tensor) -> torch.device:
        """Return where the group can communicate: offloaded gradients lie elsewhere."""
        kinds = [device.type for device in self.handle._device_types]
        return row.device if row.device.type in kinds or not kinds else _here(kinds[0])


def _here(kind: str) -> torch.device:
    return torch.device(kind)


Key: TypeAlias = tuple[frozenset[int], frozenset[int]]


class Layout:
    """Where the parts of parameters lie, and how their norms are put together.

    Args:
        params: The parameters of this process.
        ways: For each of them, how it lies on which group.
        groups: The groups by name, in the order in which they are gone round.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        ways: Sequence[Mapping[str, Way]],
        groups: Mapping[str, Group],
    ) -> None:
        """Number the groups: names of groups differ between processes."""
        number = {name: i for i, name in enumerate(groups)}
        self.groups = list(groups.values())
        self.ways = [{number[n]: way for n, way in w.items()} for w in ways]
        self.shapes = [tuple(local_of(p.detach()).shape) for p in params]
        self.device = params[0].device
        self.cut = {g for w in self.ways for g, way in w.items() if way.kind == "piece"}
        self.flattened = any(getattr(p, "_is_flat_param", False) for p in params)
        self.keys = [_key_of(w) for w in self.ways]

    def total(self, parts: Mapping[Key, Tensor], p: float) -> Tensor:
        """Return the norm of everything from the norms of what lies alike here."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        # A gradient may be missing here, and be there elsewhere.
        parts = {key: parts.get(key, zero).to(self.device) for key in self.keys}
        unheard: list[Group] = []
        for g, group in enumerate(self.groups):
            # The slots that others may have, though this process has no such tensor.
            always = {_WHOLE, (frozenset({g}), frozenset[int]())}
            keys = sorted({*parts, *always}, key=lambda k: (sorted(k[0]), sorted(k[1])))
            if any(g not in k[0] | k[1] for k in keys if k != _WHOLE):
                unheard.append(group)
            row = torch.stack([parts.get(key, zero) for key in keys])
            columns = group.gather(row).unbind(1)
            merged: dict[Key, list[Tensor]] = {}
            for key, column, mine in zip(keys, columns, row, strict=True):
                rest = key[0] - {g}, key[1] - {g}
                merged.setdefault(rest, []).append(_joined(key, g, column, mine, p))
            parts = {k: safe_norm(torch.stack(x), p) for k, x in merged.items()}
        total = safe_norm(torch.stack([zero, *parts.values()]), p)
        # What lies alike on a group, and in parts on a later one: a copy that has gone
        # wrong is known to that one only.
        for group in unheard:
            total = group.gather(total.reshape(1)).amax()
        return total

    def each_tensor(self, found: Tensor, p: float) -> Tensor:
        """Return norms of whole tensors; below 0 stands for no gradient."""
        for g, group in enumerate(self.groups):
            mine = [i for i in range(len(self.ways)) if self._goes_round(i, g)]
            if not mine:
                continue
            seen = group.gather(found[mine])
            cut = [g in self.keys[i][0] for i in mine]
            whole = safe_norm(seen.clamp(min=0), p, dim=0)
            whole = torch.where((seen < 0).all(0), -1.0, whole)
            split = torch.tensor(cut, device=found.device)
            found = found.index_copy(
                0,
                torch.tensor(mine, device=found.device),
                torch.where(split, whole, seen.amax(0)),
            )
        return found

    def _goes_round(self, i: int, g: int) -> bool:
        """Return whether the norm of a tensor is made known to a group."""
        way = self.ways[i].get(g)
        if way is not None:
            return way.kind != "other"
        # Nothing is said of it: it lies alike on all who have the pieces of others,
        # unless it is on a mesh of its own.
        on_mesh = any(self.groups[k].level == 0 for k in self.ways[i])
        return not on_mesh and (self.groups[g].level == 0 or g in self.cut)

    def each_unit(self, found: list[Tensor], p: float, axis: int) -> list[Tensor]:
        """Return norms of whole rows, from those of what is here of each parameter."""
        for g, group in enumerate(self.groups):
            mine = [i for i in range(len(found)) if self._cuts_rows(i, g, axis)]
            sizes = [len(found[i]) for i in mine]
            if sum(sizes):
                seen = group.gather(torch.cat([found[i] for i in mine]))
                whole = safe_norm(seen, p, dim=0).split(sizes)
                for i, rows in zip(mine, whole, strict=True):
                    found[i] = rows
        return found

    def _cuts_rows(self, i: int, g: int, axis: int) -> bool:
        """Return whether rows of a parameter lie in pieces on a group."""
        way, dims = self.ways[i].get(g), len(self.shapes[i])
        if way is None or way.kind != "piece":
            return False
        if dims > 1 and way.dim is not None:
            return way.dim % dims != axis % dims
        return True

    def units(self, i: int, axis: int) -> int:
        """Return how many rows this process has of a parameter."""
        shape = self.shapes[i]
        return shape[axis] if len(shape) > 1 else 1

    def check(self, rule: Rule) -> None:
        """Refuse rules whose norms cannot be put together from these parts."""
        inside = [s for s in stages(rule) if s.over in ("tensor", "unit") or s.by_place]
        if self.flattened and inside:
            raise ValueError(
                f"{inside[0]!r} looks at each tensor, and FSDP has made one of many; "
                "use FullyShardedDataParallel(use_orig_params=True), or a rule over "
                "'all'."
            )
        parts = [way for ways in self.ways for way in ways.values()]
        flat = any(way.kind == "piece" and way.dim is None for way in parts)
        if flat and any(stage.over == "unit" for stage in stages(rule)):
            raise ValueError(
                f"{rule!r} needs rows, but these parameters were laid flat before they "
                "were cut, as FSDP1 does; use fully_shard, or a rule over 'tensor'."
            )
        apart = any(way.kind == "other" for way in parts)
        groups = [r for stage in stages(rule) for _, r in getattr(stage, "rules", ())]
        if apart and any(r.over == "all" for r in groups):
            raise ValueError(
                f"{rule!r} has a group over 'all', whose tensors other processes hold; "
                "use over='tensor' in it, or a clipper of its own for the group."
            )

    def deciders(self, rule: Rule) -> list[Group]:
        """Return the groups whose processes have other numbers of a scope."""
        scopes = {stage.over for stage in stages(rule)}
        if "unit" in scopes:
            return self.groups
        if "tensor" not in scopes:
            return []
        apart = {g for w in self.ways for g, way in w.items() if way.kind == "other"}
        return [self.groups[g] for g in sorted(apart)]


_WHOLE: Key = (frozenset(), frozenset())


def _key_of(ways: Mapping[int, Way]) -> Key:
    """Return the groups that a tensor is spread over, and those with copies of it."""
    spread = frozenset(g for g, way in ways.items() if way.kind != "copy")
    return spread, frozenset(ways) - spread


def _joined(key: Key, g: int, column: Tensor, mine: Tensor, p: float) -> Tensor:
    """Return one slot of a total after it went round a group."""
    if g in key[0]:
        return safe_norm(column, p)
    if g in key[1] or key == _WHOLE:
        # Copies are equal, unless one has gone wrong: then all have to know.
        return column.amax()
    return mine


class Agreed:
    """An array namespace whose `all`, `any` and `min` speak for all processes."""

    def __init__(self, xp: Any, groups: Sequence[Group]) -> None:
        """Wrap a namespace; 0-d flags are those of norms that are common already."""
        self.here, self._groups = xp, groups

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the namespace."""
        return getattr(self.here, name)

    def any(self, x: Tensor, **options: Any) -> Tensor:
        """Return whether a flag is set on any process."""
        flag = self.here.any(x, **options)
        return flag if x.ndim == 0 else self._highest(flag.double()) > 0

    def all(self, x: Tensor, **options: Any) -> Tensor:
        """Return whether a flag is set on all processes."""
        return ~self.any(~x, **options)

    def min(self, x: Tensor, **options: Any) -> Tensor:
        """Return the smallest number on all processes, 1 where there is none."""
        if x.ndim == 0:
            return x
        least = self.here.min(x, **options) if len(x) else x.new_ones(())
        return -self._highest(-least)

    def _highest(self, x: Tensor) -> Tensor:
        for group in self._groups:
            x = group.gather(x.reshape(1)).amax()
        return x


class Sharded(InPlace):
    """The verbs for gradients of which this process has a part.

    Args:
        layout: Where the other parts are.
        rule: The rule that is going to be asked.
        present: Which parameters have a gradient here.
        amplified: As for `InPlace`.
        fused: As for `InPlace`.
    """

    def __init__(
        self,
        layout: Layout,
        rule: Rule,
        present: list[int],
        amplified: Tensor | None = None,
        fused: bool = False,
    ) -> None:
        """Take over the layout, and the axis that rows are counted along."""
        count = len(layout.ways)
        super().__init__(amplified, (count, present), fused)
        self.layout, self.present = layout, present
        self.axis = _axis(rule)
        self.xp = Agreed(self.xp, layout.deciders(rule))

    @property
    def absent(self) -> Tensor | None:
        """Nothing: what is missing here may be there on another process.

        Who has no gradient anywhere gets the norm 0, which teaches a rule as little.
        """
        return None

    def weigh(self, weights: Sequence[Tensor], over: Scope, p: float) -> Tensor:
        """Return norms of the scope that are the same on all processes."""
        if over == "unit":
            return self._unit_norms(weights, p)
        if over == "tensor":
            return self._tensor_norms(weights, p)
        order = math.inf if over == "element" else p
        alike: dict[Key, list[Tensor]] = {}
        for i, t in zip(self.present, weights, strict=True):
            alike.setdefault(self.layout.keys[i], []).append(t)
        parts = {key: self.total(group, order) for key, group in alike.items()}
        return self.layout.total(parts, order)

    def _tensor_norms(self, tensors: Sequence[Tensor], p: float) -> Tensor:
        count, device = len(self.layout.ways), self.layout.device
        found = torch.full((count,), -1.0, dtype=torch.float64, device=device)
        if tensors:
            found[self.present] = self.per_tensor(tensors, p).to(device)
        return self.layout.each_tensor(found, p).clamp(min=0)

    def _unit_norms(self, tensors: Sequence[Tensor], p: float) -> Tensor:
        here = dict(zip(self.present, tensors, strict=True))
        none = torch.zeros(0, dtype=torch.float64, device=self.layout.device)
        found = [
            self.per_unit([here[i]], p)
            if i in here
            else none.new_zeros(self.layout.units(i, self.axis))
            for i in range(len(self.layout.ways))
        ]
        found = self.layout.each_unit(found, p, self.axis)
        return torch.cat([none, *(found[i] for i in self.present)])

    def gathered(self, findings: list[str]) -> list[str]:
        """Return what was found on any process, with its rank; all ask together."""
        import torch.distributed as dist

        found = {(dist.get_rank(), finding) for finding in findings}
        for group in self.layout.groups:
            told: list[set[tuple[int, str]]] = [found] * group.size
            dist.all_gather_object(told, found, group=group.handle)
            found = found.union(*told)
        return [f"{finding} on rank {rank}" for rank, finding in sorted(found)]

    def tops(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the largest modulus of each whole tensor; all processes ask."""
        return self.measure(leaves, "tensor", math.inf)

    @property
    def here(self) -> Any:
        """The array namespace that speaks for this process alone."""
        return self.xp.here

    def agreed(self, info: Info) -> Info:
        """Return the extremes of all processes, in one message to each group."""
        clipped = info.clipped.to(info.limit.dtype)
        row = torch.stack([info.limit, -info.scale, info.norm_after, clipped])
        for group in self.layout.groups:
            row = group.gather(row).amax(0)
        limit, low, after, clipped = row.unbind()
        return info._replace(
            limit=limit, scale=-low, norm_after=after, clipped=clipped > 0
        )

    def multiply(
        self, leaves: Sequence[Tensor], scale: Tensor, over: Scope
    ) -> list[Tensor]:
        """Multiply what is here by its scale."""
        return super().multiply(leaves, scale, over) if leaves else []


def _axis(rule: Rule) -> int:
    """Return the axis that a rule counts units along, which has to be one."""
    axes = {stage.axis for stage in stages(rule) if stage.over == "unit"}
    if len(axes) > 1:
        raise ValueError(
            f"{rule!r} counts units along several axes; on split parameters use one."
        )
    return axes.pop() if axes else 0


def layout_of(
    named: Iterable[tuple[str, Tensor]],
    split_over: SplitOver = None,
    module: torch.nn.Module | None = None,
) -> Layout | None:
    """Return how parameters are split over processes; None where none is."""
    pairs = list(named)
    params = [p for _, p in pairs]
    flat = _flattened(module)
    _check_whole(pairs, flat)
    if split_over is None and not any(flat.values()) and not holds_dtensor(params):
        return None
    groups: dict[str, Group] = {}
    ways: list[dict[str, Way]] = []
    for name, p in pairs:
        asked = split_over(name, p) if callable(split_over) else split_over
        parts = [
            *_on_mesh(name, p, asked),
            *flat.get(id(p), ()),
            *_as_asked(asked, name),
        ]
        ways.append({})
        for handle, way, level in parts:
            if handle.size() > 1:
                ways[-1][handle.group_name] = way
                _note(groups, handle, level)
    ordered = dict(sorted(groups.items(), key=lambda item: item[1].level))
    return Layout(params, ways, ordered)


Part: TypeAlias = tuple["ProcessGroup", Way, int]


def _note(groups: dict[str, Group], handle: "ProcessGroup", level: int) -> None:
    """Note a group in the place that its outermost use asks for."""
    group = groups.setdefault(handle.group_name, Group(handle, level))
    group.level = max(group.level, level)


def _on_mesh(name: str, p: Tensor, asked: Any) -> list[Part]:
    """Return the groups of the mesh that a DTensor lies on."""
    if not is_dtensor(p):
        return []
    mesh = p.device_mesh  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None and not asked:
        raise ValueError(
            f"parameter {name!r} lies on a mesh without this process, so that its norm "
            "is not known here; name the group of all processes with split_over, or "
            "take a clipper for the parameters of each mesh."
        )
    if mesh.get_coordinate() is None:
        return []
    placements = p.placements  # type: ignore[attr-defined]
    return [(mesh.get_group(i), _placed(x), 0) for i, x in enumerate(placements)]


def _placed(placement: Any) -> Way:
    if placement.is_replicate() or placement.is_partial():
        return Way("copy")
    return Way("piece", placement.dim)


def _as_asked(asked: Any, name: str) -> list[Part]:
    """Return the groups that a caller named, the outermost last."""
    if asked is None:
        return []
    parts = list(asked) if isinstance(asked, tuple | list) else [asked]
    found: list[Part] = []
    for level, part in enumerate(parts, 1):
        handle = part.group if isinstance(part, Pieces) else part
        if not hasattr(handle, "group_name"):
            raise TypeError(
                f"split_over gives {type(handle).__name__} for {name!r}; it takes a "
                "process group, Pieces(group, dim), several of them, or None."
            )
        piece = isinstance(part, Pieces)
        found.append((handle, Way("piece", part.dim) if piece else Way("other"), level))
    return found


def _flattened(module: torch.nn.Module | None) -> dict[int, list[Part]]:
    """Return the groups of parameters that FSDP1 has laid flat and cut."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if module is None or fsdp is None:
        return {}
    found: dict[int, list[Part]] = {}
    for unit in fsdp.FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None:
            continue
        flat, part = handle.flat_param, (unit.process_group, Way("piece"), 0)
        for p in (flat, *(flat._params or ())):
            found[id(p)] = [part] if handle.uses_sharded_strategy else []
    return found


def _check_whole(named: list[tuple[str, Tensor]], known: Mapping[int, Any]) -> None:
    """Refuse parameters that FSDP1 has cut, if it is not known over which group."""
    lost = [
        name
        for name, p in named
        if getattr(p, "_fsdp_flattened", False) and id(p) not in known
    ]
    if lost:
        raise ValueError(
            f"FSDP's first version has laid flat and cut {len(lost)} parameters, such "
            f"as {lost[0]}, and their norms would be those of pieces; hand over the "
            "model that FullyShardedDataParallel returned: Clipper(model, rule), or "
            "attach(optimizer, rule, model=model)."
        )


def refuse_pieces(tensors: Sequence[Tensor]) -> None:
    """Refuse what FSDP1 has cut, where there is no module that knows its groups."""
    if torch.compiler.is_compiling() or "torch.distributed.fsdp" not in sys.modules:
        return
    _check_whole([(f"[{i}]", t) for i, t in enumerate(tensors)], {})


def is_dtensor(t: Tensor) -> bool:
    """Return whether a tensor knows where its other parts are."""
    return holds_dtensor([t])


def holds_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Return whether there is a DTensor among tensors; quick for many."""
    if torch.compiler.is_compiling():
        return False
    kinds = set(map(type, tensors)) - {Tensor, torch.nn.Parameter}
    module = sys.modules.get("torch.distributed.tensor") if kinds else None
    return module is not None and any(issubclass(k, module.DTensor) for k in kinds)


def local_of(t: Tensor) -> Tensor:
    """Return what this process has of a tensor, in the same memory."""
    if not is_dtensor(t):
        return t
    local = t.to_local()  # type: ignore[attr-defined]
    return local.wait() if hasattr(local, "wait") else local


def part_of(g: Tensor) -> Tensor:
    """Return what this process has of a gradient that has no parameter beside it."""
    return local_of(laid_out_as(g, g)) if is_dtensor(g) else g


def full_of(t: Tensor) -> Tensor:
    """Return a DTensor, such as a norm of torch's own function, as a plain tensor."""
    return t.full_tensor() if is_dtensor(t) else t  # type: ignore[attr-defined]


def laid_out_like(p: Tensor, local: Tensor) -> Tensor:
    """Return what belongs to the part of a parameter here, as one of all its parts."""
    if not is_dtensor(p) or local.shape != local_of(p).shape or not local.dim():
        return local
    from torch.distributed.tensor import DTensor

    where: Any = p
    return DTensor.from_local(
        local,
        where.device_mesh,
        where.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def part_like(p: Tensor, x: Tensor) -> Tensor:
    """Return what this process needs of something saved for a parameter."""
    if is_dtensor(x) or not is_dtensor(p) or x.shape != p.shape:
        return local_of(x)
    from torch.distributed.tensor import distribute_tensor

    where: Any = p
    mesh, at = where.device_mesh, where.placements
    return local_of(distribute_tensor(x, mesh, at, src_data_rank=None))


def local_grad(p: Tensor, g: Tensor) -> Tensor:
    """Return what this process has of a gradient, laid out as its parameter is."""
    if not is_dtensor(g):
        return g
    laid_out = laid_out_as(p, g)
    if torch._debug_has_internal_overlap(local_of(laid_out)) == 1:
        laid_out = laid_out.clone(memory_format=torch.contiguous_format)
    if laid_out is not g:
        p.grad = laid_out
    return local_of(laid_out)


def laid_out_as(p: Tensor, g: Any) -> Any:
    """Return a gradient with the placements of its parameter; sums are carried out."""
    from torch.distributed.tensor import Replicate

    placed = p.placements if is_dtensor(p) else g.placements  # type: ignore[attr-defined]
    wanted = [Replicate() if x.is_partial() else x for x in placed]
    return g if list(g.placements) == wanted else g.redistribute(placements=wanted)
