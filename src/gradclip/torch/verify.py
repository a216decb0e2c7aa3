"""Checks, made at every step, that processes clip the same model in the same way.

Before a clip all processes compare their gradients, after it what was decided. All of
them see the same numbers and judge them alike, so all raise together and nobody waits.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from gradclip.decision import Info
from gradclip.policy import NonFiniteError
from gradclip.torch.dtensors import local_of
from gradclip.torch.fingerprints import (
    Fingerprint,
    Held,
    Pair,
    also_weights,
    close,
    described,
    like_shards,
    unlike_copies,
)
from gradclip.torch.layout import Group, Layout
from gradclip.torch.placement import check_group
from gradclip.torch.verbs import InPlace
from gradclip.wording import listed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Verify: TypeAlias = "bool | ProcessGroup"
Outcome: TypeAlias = tuple[Any, Info, Any]

SHOWN = 5
"""How many parameters a message names."""
_SUMS = " The numbers are sums over the tensors that all of them have."
DECIDED = ("norm", "limit", "scale", "finite", "clipped", "kept")


class VerifyError(RuntimeError):
    """Processes do not clip the same model in the same way."""


class Verifier:
    """Compares the processes of a group; made by all of them at the same time.

    Args:
        names: The names of the parameters of this process.
        params: These parameters.
        layout: How they lie on the processes; None for whole ones.
        group: The processes that have the model together.
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        layout: Layout | None,
        group: "ProcessGroup",
    ) -> None:
        """Tell each other which parameters and groups there are."""
        import torch.distributed as dist

        self.group, self.params = Group(group, 0), params
        self.split = layout is not None
        self.ranks = dist.get_process_group_ranks(group)
        mine = list(described(names, params, layout))
        groups: dict[tuple[int, ...], list[int]] = {}
        if layout is not None:
            for g, keys in zip(layout.groups, layout.slots, strict=True):
                groups.setdefault(g.ranks, []).append(len(keys))
        gathered: list[tuple[list[Held], dict[tuple[int, ...], list[int]]]]
        gathered = [([], {}) for _ in self.ranks]
        dist.all_gather_object(gathered, (mine, groups), group=group)
        self.held = dict(zip(self.ranks, (held for held, _ in gathered), strict=True))
        self.groups = dict(zip(self.ranks, (g for _, g in gathered), strict=True))
        self.width = max(map(len, self.held.values()))
        whole = [{h.name for h in held if h.whole} for held in self.held.values()]
        self.common = set.intersection(*whole)
        self._check_groups()
        self._check_places()

    def before(self, present: Sequence[int], leaves: Sequence[Tensor]) -> None:
        """Compare gradients that are about to be clipped."""
        prints = self._exchange(present, leaves)
        apart, alike = list(unlike_copies(prints)), list(like_shards(prints))
        if not (apart or alike):
            return
        # All see the same numbers, so that all of them get here, or none.
        weights = [local_of(p.detach()) for p in self.params]
        found = self._exchange(range(len(weights)), weights)
        of = {(x.rank, x.held): x for x in found}
        if apart:
            raise VerifyError(_about_copies(apart, of))
        replicas = [pair for pair in alike if also_weights(*pair, of)]
        if replicas:
            raise VerifyError(_about_replicas(replicas))

    def compare(self, clip: Callable[[], Outcome], units: bool = False) -> Outcome:
        """Clip, and compare what is reported with what is reported elsewhere.

        Of `units`, each process has its own, however many there are.
        """
        try:
            outcome = clip()
        except (NonFiniteError, TypeError, ValueError):
            # The others are about to exchange what they decided, and would wait. Where
            # parameters are split they wait for a message of the clip, and another in
            # its place would end their processes.
            if not self.split:
                self._gathered([1.0] + [0.0] * len(DECIDED))
            raise
        info = outcome[1]
        numbers = [getattr(info, name) for name in DECIDED]
        decided = [0.0 if units and x.ndim else self._common(x) for x in numbers]
        failed, *columns = self._gathered([0.0, *decided])
        if failed.any():
            raise VerifyError(self._about_failure(failed))
        for name, column in zip(DECIDED, columns, strict=True):
            for i, value in enumerate(column.tolist()):
                if not close(value, column[0].item()):
                    said = self._about_decision(name, i, columns)
                    raise VerifyError(said if info.norm.ndim == 0 else said + _SUMS)
        return outcome

    def _exchange(
        self, which: Iterable[int], tensors: Sequence[Tensor]
    ) -> list[Fingerprint]:
        """Return two norms of each tensor of each process; -1 where there is none."""
        row = torch.full((self.width, 2), -1.0, dtype=torch.float64, device="cpu")
        if tensors:
            verbs, at = InPlace(), list(which)
            row[at, 0] = verbs.per_tensor(tensors, 2.0).cpu()
            row[at, 1] = verbs.per_tensor(tensors, math.inf).cpu()
        seen = self.group.gather(row.flatten()).view(-1, self.width, 2).tolist()
        # Who has fewer parameters than others sends -1 behind them.
        return [
            Fingerprint(rank, held, *numbers)
            for rank, rows in zip(self.ranks, seen, strict=True)
            for held, numbers in zip(self.held[rank], rows, strict=False)
        ]

    def _common(self, x: Tensor) -> float:
        """Return a number that has to be equal everywhere; 0 for cells of one's own."""
        if x.ndim == 0:
            return float(x)
        if len(x) != len(self.params):
            return 0.0
        # Stages and experts have tensors that others lack, so that sums would differ.
        mine = self.held[self.ranks[self.group.handle.rank()]]
        at = [i for i, held in enumerate(mine) if held.name in self.common]
        return float(x[at].sum())

    def _gathered(self, mine: Sequence[float]) -> Sequence[Tensor]:
        row = torch.tensor(mine, dtype=torch.float64, device="cpu")
        return self.group.gather(row).unbind(1)

    def _about_failure(self, failed: Tensor) -> str:
        ranks = [str(self.ranks[i]) for i in failed.nonzero().flatten().tolist()]
        return (
            f"rank {', '.join(ranks)} refused this step, for which its own error gives "
            "the reason, and would leave the others waiting at the next one."
        )

    def _about_decision(self, name: str, i: int, columns: list[Tensor]) -> str:
        there, here = (
            ", ".join(
                f"{n} {column[at].item():.6g}"
                for n, column in zip(DECIDED[:3], columns, strict=False)
            )
            for at in (0, i)
        )
        return (
            f"rank {self.ranks[i]} has {here}, but rank {self.ranks[0]} has {there}: "
            f"the gradients agree, the {name} does not. Likely cause: another limit or "
            "another saved memory was given to one of them. Give all the same rule, "
            "and load the same state."
        )

    def _check_groups(self) -> None:
        """Refuse a group that one of its members does not know: others would wait."""
        pairs = [(rank, g) for rank, groups in self.groups.items() for g in groups]
        for rank, group in pairs:
            # Of a rank that does not take part in comparing nothing is known.
            unaware = [r for r in group if group not in self.groups.get(r, [group])]
            if unaware:
                raise VerifyError(
                    f"rank {rank} splits {self._names_in(rank, group)} over the "
                    f"{_group(group)}, of which rank {unaware[0]} knows nothing, so "
                    f"that rank {rank} would wait for it for ever. Likely cause: a "
                    f"group is missing on rank {unaware[0]}: split_over has to name it "
                    "there for at least one parameter."
                )
            self._check_order(rank, group)

    def _check_order(self, rank: int, group: tuple[int, ...]) -> None:
        """Refuse a group whose members would send it vectors of several lengths."""
        mine = self.groups[rank][group]
        for other in group:
            if (theirs := self.groups.get(other, {}).get(group, mine)) != mine:
                here, there = (", ".join(map(str, x)) for x in (mine, theirs))
                raise VerifyError(
                    f"rank {rank} has {here} numbers for the {_group(group)}, and rank "
                    f"{other} has {there}. Likely cause: the order of several groups "
                    "in split_over. A group between processes with different "
                    "parameters, such as stages of a pipeline, comes behind those "
                    "within a stage: (ep_group, pp_group)."
                )

    def _names_in(self, rank: int, group: tuple[int, ...]) -> str:
        names = [held.name for held in self.held[rank] if group in held.declared]
        return _quoted(names) if names else "its parameters"

    def _check_places(self) -> None:
        """Refuse whole parameters of which some processes would never hear."""
        holders: dict[Held, set[int]] = defaultdict(set)
        for rank, held in self._all_held():
            if not held.place:
                holders[held].add(rank)
        lacking: dict[tuple[int, int], list[str]] = defaultdict(list)
        connected = self._connected()
        for held, ranks in holders.items():
            for together in connected:
                if not together & ranks:
                    lacking[min(ranks), min(together)].append(held.name)
        if lacking:
            (having, without), names = next(iter(lacking.items()))
            raise VerifyError(
                f"rank {having} has {_quoted(names)}, which rank {without} does not "
                "have, and no group connects the two, so that each would clip by a "
                "norm of its own. Likely cause: a group is missing: declare stages of "
                "a pipeline, experts and slices with split_over."
            )

    def _all_held(self) -> Iterator[tuple[int, Held]]:
        return ((rank, held) for rank, every in self.held.items() for held in every)

    def _connected(self) -> list[set[int]]:
        """Return the sets of ranks whose norms reach each other."""
        found = [{rank} for rank in self.ranks]
        for groups in self.groups.values():
            for group in map(set, groups):
                joined = group.union(*(s for s in found if s & group))
                found = [s for s in found if not s & group] + [joined]
        return found


def verifier_for(
    verify: Verify,
    names: Sequence[str],
    params: Sequence[Tensor],
    layout: Layout | None,
) -> Verifier | None:
    """Return what compares processes; None where that was not asked, or is only one."""
    if verify is False or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized():
        return None
    group = torch.distributed.group.WORLD if verify is True else verify
    if group is None:
        return None
    check_group(
        group,
        "verify is",
        outside="hand over verify=False",
        takes="True, False or a process group",
    )
    return Verifier(names, params, layout, group) if group.size() > 1 else None


def _about_copies(apart: list[Pair], of: dict[tuple[int, Held], Fingerprint]) -> str:
    unlike = [
        (a, b) for a, b in apart if not of[a.rank, a.held].near(of[b.rank, b.held])
    ]
    a, b = (unlike or apart)[0]
    names = _quoted([x.held.name for _, x in (unlike or apart) if x.rank == b.rank])
    if unlike:
        v, w = of[a.rank, a.held], of[b.rank, b.held]
        return (
            f"rank {b.rank} has other parameters than rank {a.rank} under the same "
            f"name: {names} (of the first, the norm of the parameter is {w.norm:.6g} "
            f"and {v.norm:.6g}). Likely cause: a group is missing: declare experts, "
            "slices and stages of a pipeline with split_over. Nothing was changed."
        )
    return (
        f"rank {b.rank} has other gradients than rank {a.rank} for parameters that are "
        f"equal: {names} (of the first, the norm is {_size(b)} and {_size(a)}). Likely "
        "cause: the clip comes before the gradients are synchronised, as under "
        "no_sync(), or ahead of an all-reduce of your own. Clip after it. Nothing was "
        "changed."
    )


def _about_replicas(replicas: list[Pair]) -> str:
    a, b = replicas[0]
    names = _quoted([x.held.name for _, x in replicas if x.rank == b.rank])
    group = next(g for g in b.held.declared if a.rank in g)
    return (
        f"rank {b.rank} has the same parameters and gradients as rank {a.rank}, though "
        f"split_over says that they differ within the {_group(group)}: {names}. Likely "
        "cause: a replica is counted as a shard, which makes the norm too large by up "
        f"to the root of {len(group)}. Have split_over return None for it. Nothing was "
        "changed."
    )


def _size(x: Fingerprint) -> str:
    return "missing" if x.norm < 0 else f"{x.norm:.6g}"


def _quoted(names: Sequence[str]) -> str:
    return listed(list(map(repr, names)), SHOWN)


def _group(ranks: Sequence[int]) -> str:
    return f"group of ranks {', '.join(map(str, ranks))}"
