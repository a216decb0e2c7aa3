"""The verbs for gradients that lie in parts on several processes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip.decision import Info
from gradclip.rules import Rule, Scope, stages
from gradclip.torch.constants import sent
from gradclip.torch.layout import Group, Key, Layout
from gradclip.torch.verbs import InPlace


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
        # A flag of norms that only some processes have would make them decide apart.
        self.xp = Agreed(self.xp, layout.deciders(rule))

    def absent(self, device: torch.device) -> Tensor | None:
        """Return nothing: what is missing here may be there on another process.

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
        # No norm is below 0: it marks what is missing here, and may be there elsewhere.
        found = torch.full((count,), -1.0, dtype=torch.float64, device=device)
        if tensors:
            here = self.per_tensor(tensors, p).to(device)
            found = found.index_copy(0, sent(self.present, device), here)
        found = self.layout.each_tensor(found, p)
        return torch.where(found < 0, self.missing, found)

    def _unit_norms(self, tensors: Sequence[Tensor], p: float) -> Tensor:
        here = dict(zip(self.present, tensors, strict=True))
        none = torch.zeros(0, dtype=torch.float64, device=self.layout.device)
        # A missing gradient sends zeros: all vectors that are gathered have one length.
        found = [
            self.per_unit([here[i]], p)
            if i in here
            else none.new_zeros(self.layout.units(i, self.axis))
            for i in range(len(self.layout.ways))
        ]
        found = self.layout.each_unit(found, p, self.axis)
        # `cat` refuses an empty list, which a process without gradients has.
        return torch.cat([none, *(found[i] for i in self.present)])

    def gathered(self, findings: list[str]) -> list[str]:
        """Return what was found on any process, with its rank; all ask together."""
        import torch.distributed as dist

        found = {(dist.get_rank(), finding) for finding in findings}
        for group in self.layout.groups:
            gathered: list[set[tuple[int, str]]] = [found] * group.size
            dist.all_gather_object(gathered, found, group=group.handle)
            found = found.union(*gathered)
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
        # Negated, the smallest scale is the largest: one message does for all four.
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
