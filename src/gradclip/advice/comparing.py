"""Which runs of a log are judged together, and which are left out."""

import numpy as np

from gradclip.advice.evidence import same_level
from gradclip.advice.spikes import FEWEST
from gradclip.record import Record, kind_of
from gradclip.rules import usable


def comparable(record: Record) -> tuple[Record, list[str]]:
    """Return the runs that can be judged together: all alike, or else the newest."""
    record = _of_one_kind(record)
    notes = list(record.notes)
    names = np.unique(record.run)
    if names.size < 2:
        return record, notes
    medians = {}
    for name in names:
        norm = record.norm[record.run == name]
        if usable(norm).sum() >= FEWEST:
            medians[int(name)] = float(np.median(norm[usable(norm)]))
    levels = ", ".join(f"{x:.3g}" for x in medians.values())
    if not medians:
        return record, notes
    if short := names.size - len(medians):
        notes.append(
            f"{short} of {names.size} runs have fewer than {FEWEST} usable norms, and "
            "do not count."
        )
    if same_level(*medians.values()):
        if len(medians) > 1:
            alike = f"the runs are alike (median norms {levels}) and count together."
            notes.append(alike)
        return record.take(np.isin(record.run, list(medians))), notes
    newest = max(medians)
    notes.append(
        f"the runs differ (median norms {levels}); the advice is for the newest, "
        f"number {newest + 1} of {names.size}."
    )
    return record.of_run(newest), notes


def _of_one_kind(record: Record) -> Record:
    """Leave out runs whose norms are of another order than those of the newest."""
    names = np.unique(record.run).tolist()
    kinds = [kind_of(record.rule_of(name)) for name in names]
    kept = [x for x, kind in zip(names, kinds, strict=True) if kind == kinds[-1]]
    if len(kept) == len(names):
        return record
    rule = record.rule_of(names[-1])
    return record.take(np.isin(record.run, kept)).also(
        f"{len(names) - len(kept)} of {len(names)} runs hold other norms than {rule} "
        "takes, and do not count."
    )
