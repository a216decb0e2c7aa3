"""Spectral clipping by products of matrices alone, against the decomposition.

`python -m benchmarks.spectral` prints how long each takes, as a share of the time of
`Smooth` or `Norm` over singular values, and how far it is from them.
"""

import argparse
from functools import partial

import torch

import gradclip as gc
from benchmarks.timing import alternate

LIFT, POLISH = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)
"""Coefficients of a quintic step: Muon's, which raise fast, and those that converge."""
STEPS = [LIFT] * 8 + [POLISH] * 4


def polar(x):
    """Return the matrix with all singular values at 1, by Newton-Schulz steps."""
    x = x / torch.linalg.matrix_norm(x)
    for a, b, c in STEPS:
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x


def coupled(x, c):
    """SPECTRA's smooth map: (I + X Xᵀ / c²)^(-1/2) X, by a coupled iteration."""
    eye = torch.eye(len(x), dtype=x.dtype)
    square = eye + x @ x.mT / c**2
    top = torch.linalg.matrix_norm(square)
    y, z = square / top, eye
    for _ in range(25):
        t = 1.5 * eye - 0.5 * z @ y
        y, z = y @ t, t @ z
    return z / top.sqrt() @ x


def stacked(x, c):
    """The smooth map as the upper half of the polar factor of X / c above I."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return c * polar(torch.cat([x / c, eye]))[: len(x)]


def signs(x, c):
    """The hard map by two sign iterations: min(s, 1) = (s + 1 - |s - 1|) / 2."""
    x = x / c
    o = polar(x)
    above = polar(o.mT @ x - torch.eye(x.shape[1], dtype=x.dtype))
    return c / 2 * (x + o - (x - o) @ above)


def eigen(x, c):
    """The smooth map by the eigenvalues of XᵀX, whose small ones are lost."""
    values, vectors = torch.linalg.eigh(x.mT @ x)
    return x @ (vectors * (1 + values.clamp(min=0) / c**2).rsqrt()) @ vectors.mT


WAYS = {"coupled": coupled, "stacked": stacked, "signs": signs, "eigen": eigen}


def rows(size, rounds):
    """Time and compare each way, for two types and for spikes of two sizes."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    spike = torch.outer(noise[0], noise[1]) / size**0.5
    for dtype in (torch.float32, torch.float64):
        for height in (10.0, 1000.0):
            x, c = (noise + height * spike).to(dtype), size**0.5
            hard = partial(gc.clip, x, gc.Norm(c, over="singular"))
            smooth = partial(gc.clip, x, gc.Smooth(c, over="singular", curve="root"))
            sides = {name: partial(way, x, c) for name, way in WAYS.items()}
            times = alternate(sides | {"ours": smooth}, rounds)
            for name, way in WAYS.items():
                want = (hard if name == "signs" else smooth)()[0]
                off = float((way(x, c) - want).abs().max() / want.abs().max())
                yield dtype, height, name, times[name] / times["ours"], off


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype, height, name, ratio, off in rows(given.size, given.rounds):
        print(f"{dtype} spike {height:6.0f} {name:8} {ratio:5.2f} x  off by {off:.0e}")


if __name__ == "__main__":
    main()
