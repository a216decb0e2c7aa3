"""Time two sides in turn, so that a noisy machine treats them alike."""

import statistics
import time


def alternate(sides, rounds, before=None):
    """Return the median time of each side in milliseconds.

    Args:
        sides: Functions without arguments, by name.
        rounds: How many times each is called, after one that does not count.
        before: Called ahead of every call, outside the time.
    """
    times = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            if before is not None:
                before(name)
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}
