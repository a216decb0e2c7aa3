"""How norms of parts that lie on several processes are put together.

Every process measures what it has, in float64. Then one vector goes round each process
group, and all processes put the parts together in the order of the ranks, so that the
result is the same everywhere, to the bit. Who takes part follows from the parameters,
never from the gradients: a missing, empty or broken gradient makes nobody wait.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from gradclip.policy import only_records
from gradclip.rules import Rule, stages
from gradclip.torch.constants import sent
from gradclip.torch.dtensors import AT, is_dtensor, local_of
from gradclip.torch.exact import safe_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The numbers of its processes among all."""
        import torch.distributed as dist

        return tuple(dist.get_process_group_ranks(self.handle))

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
        """Return where the group can communicate: offloaded gradients lie elsewhere.

        Otherwise gloo or NCCL has no backend for them (pytorch#148532).
        """
        kinds = [device.type for device in self.handle._device_types]
        known = row.device.type in kinds or not kinds
        return row.device if known else torch.device(kinds[0])


Key: TypeAlias = tuple[frozenset[int], frozenset[int]]
_WHOLE: Key = (frozenset(), frozenset())


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
        self.cut = self._groups_with("piece")
        self.apart = self._groups_with("other")
        self.flattened = any(getattr(p, "_is_flat_param", False) for p in params)
        self.keys = [_key_of(w) for w in self.ways]
        self.slots = list(self._slots())
        self.on_mesh = list(map(is_dtensor, params))
        pairs = zip(self.on_mesh, ways, strict=True)
        self.sized = all(on_mesh or not way for on_mesh, way in pairs)

    def _groups_with(self, kind: str) -> set[int]:
        """Return the groups on which some parameter lies in this way."""
        return {g for w in self.ways for g, way in w.items() if way.kind == kind}

    def _slots(self) -> Iterator[list[Key]]:
        """Yield what each group is told of a total, one number for each key."""
        keys = set(self.keys)
        for g in range(len(self.groups)):
            # The slots that others may have, though this process has no such tensor.
            keys |= {_WHOLE, (frozenset({g}), frozenset[int]())}
            # Sets have no order, and each slot has to mean the same on all processes.
            yield sorted(keys, key=lambda k: (sorted(k[0]), sorted(k[1])))
            keys = {_behind(key, g) for key in keys}

    def total(self, parts: Mapping[Key, Tensor], p: float) -> Tensor:
        """Return the norm of everything from the norms of what lies alike here."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        # A gradient may be missing here, and be there elsewhere: who returned early
        # would leave the others waiting (areal-project/AReaL#1139).
        parts = {key: parts.get(key, zero).to(self.device) for key in self.keys}
        unheard: list[Group] = []
        for g, (group, keys) in enumerate(zip(self.groups, self.slots, strict=True)):
            if any(g not in k[0] | k[1] for k in keys if k != _WHOLE):
                unheard.append(group)
            row = torch.stack([parts.get(key, zero) for key in keys])
            # One vector for all: stacked DTensors of two meshes raise, and take hours
            # (pytorch#180346, pytorch#169445).
            columns = group.gather(row).unbind(1)
            merged: dict[Key, list[Tensor]] = {}
            for key, column, mine in zip(keys, columns, row, strict=True):
                joined = _joined(key, g, column, mine, p)
                merged.setdefault(_behind(key, g), []).append(joined)
            parts = {k: safe_norm(torch.stack(x), p) for k, x in merged.items()}
        total = safe_norm(torch.stack([zero, *parts.values()]), p)
        # What lies alike on a group, and in parts on a later one: a copy that has gone
        # wrong is known to that one only.
        for group in unheard:
            total = group.gather(total.reshape(1)).amax()
        return total

    def each_tensor(self, found: Tensor, p: float) -> Tensor:
        """Return norms of whole tensors; below 0 stands for no gradient."""
        for g, (group, mine) in enumerate(zip(self.groups, self.heard, strict=True)):
            if not mine:
                continue
            at = sent(mine, found.device)
            seen = group.gather(found[at])
            cut = sent([g in self.keys[i][0] for i in mine], found.device)
            whole = safe_norm(seen.clamp(min=0), p, dim=0)
            whole = torch.where((seen < 0).all(0), -1.0, whole)
            found = found.index_copy(0, at, torch.where(cut, whole, seen.amax(0)))
        return found

    @cached_property
    def heard(self) -> list[list[int]]:
        """Of which tensors each group hears the norm."""
        every = range(len(self.ways))
        return [
            [i for i in every if self._goes_round(i, g)]
            for g in range(len(self.groups))
        ]

    def _goes_round(self, i: int, g: int) -> bool:
        """Return whether the norm of a tensor is made known to a group."""
        way = self.ways[i].get(g)
        if way is not None:
            return way.kind != "other"
        # Nothing is said of it: it lies alike on all who have the pieces of others,
        # unless it is on a mesh of its own, or some of these have others in its place.
        on_mesh = any(self.groups[k].level == 0 for k in self.ways[i])
        spread = self.groups[g].level == 0 or g in self.cut
        return spread and not on_mesh and not self._differs(i, g)

    def _differs(self, i: int, g: int) -> bool:
        """Return whether members of a group have other tensors in the place of one."""
        return any(
            # This process is in both.
            len({*self.groups[g].ranks} & {*self.groups[k].ranks}) > 1
            for k, way in self.ways[i].items()
            if way.kind == "other"
        )

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

    def tag(self, i: int) -> str:
        """Return what tells the memory of a tensor from others in its place."""
        ways, on_mesh = self.ways[i].items(), self.on_mesh[i]
        spread = {g for g, way in ways if way.kind != "copy"}
        # Of a DTensor, its mesh tells which part is here.
        named = {g for g in spread if self.groups[g].level > 0 or not on_mesh}
        # A tensor that all stages have is not in the same place of all.
        return self._tag(named if on_mesh else named | self.apart)

    @property
    def tag_of_all(self) -> str:
        """What tells the parameters of a process from others in their place."""
        return self._tag(self.apart)

    def _tag(self, which: Iterable[int]) -> str:
        groups = [self.groups[g] for g in sorted(which)]
        return AT * bool(groups) + "+".join(
            f"{group.handle.rank()}of{group.size}" for group in groups
        )

    def check(self, rule: Rule) -> None:
        """Refuse rules whose norms cannot be put together from these parts."""
        for stage in stages(rule):
            self._check_parts(stage)
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
        groups = [s for s in stages(rule) if s.over != "all"]
        if self.apart and any(r.over == "all" for s in groups for r in s.within()):
            raise ValueError(
                f"{rule!r} has a group over 'all', whose tensors other processes hold; "
                "use over='tensor' in it, or a clipper of its own for the group."
            )

    def _check_parts(self, stage: Rule) -> None:
        """Refuse a rule that has to see whole tensors, or to know their sizes."""
        scopes = {r.over for r in stage.within() if not only_records(r)}
        # Beside units, tensors are measured by their rows, of which others have some.
        if {"unit"} < scopes:
            raise ValueError(
                f"{stage!r} has groups over each 'unit' beside others, which cannot be "
                "measured together where processes have parts of tensors; take a "
                "Clipper for the parameters of each, or one scope for all groups."
            )
        if stage.over == "singular":
            raise ValueError(
                f"{stage!r} looks at whole tensors, and processes have parts of these; "
                "use a rule over 'all', each 'tensor' or each 'unit'."
            )
        if stage.needs_shape and not self.sized:
            raise ValueError(
                f"{stage!r} counts elements, and only a DTensor tells how many there "
                "are on all processes; use Norm."
            )

    def deciders(self, rule: Rule) -> list[Group]:
        """Return the groups whose members see different norms, and have to agree."""
        scopes = {stage.over for stage in stages(rule)}
        if "unit" in scopes:
            return self.groups
        if "tensor" not in scopes:
            return []
        return [self.groups[g] for g in sorted(self.apart)]


def _key_of(ways: Mapping[int, Way]) -> Key:
    """Return the groups that a tensor is spread over, and those with copies of it."""
    spread = frozenset(g for g, way in ways.items() if way.kind != "copy")
    return spread, frozenset(ways) - spread


def _behind(key: Key, g: int) -> Key:
    """Return what is left of a key once a group has heard of it."""
    return key[0] - {g}, key[1] - {g}


def _joined(key: Key, g: int, column: Tensor, mine: Tensor, p: float) -> Tensor:
    """Return one slot of a total after it went round a group."""
    if g in key[0]:
        return safe_norm(column, p)
    if g in key[1] or key == _WHOLE:
        # Copies are equal, unless one has gone wrong: then all have to know.
        return column.amax()
    return mine
