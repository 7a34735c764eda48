"""Spatial reduction: what the contract runs, and its float64 reference."""

import math

import numpy as np

from tests.attention.oracles import LINEARS, Problem, exact, linear, multihead

NORM = 2 * 32
VARIANTS = {
    "spatial_reduction(ratio=2)": LINEARS + 4 * 32 * 32 + 32 + NORM,
    "spatial_reduction(reduction='pool', size=4)": LINEARS + 32 * 32 + 32 + NORM,
    "spatial_reduction(ratio=1)": LINEARS,
}


def normal(w, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]


def convolved(w, x, ratio):
    """Every whole window of the picture [B,R,C,E], or of one filled up with zeros to a window."""
    fill = [(0, max(0, ratio - side)) for side in x.shape[1:3]]
    x = np.pad(x, [(0, 0), *fill, (0, 0)])
    out = []
    for i, j in np.ndindex(x.shape[1] // ratio, x.shape[2] // ratio):
        window = x[:, ratio * i : ratio * (i + 1), ratio * j : ratio * (j + 1)]
        out.append(np.einsum("brce,rcef->bf", window, w["kernel"]) + w["bias"])
    return np.stack(out, axis=1)


def shares(x, size):
    """Means over size x size shares of the picture, row by row."""
    rows, columns = x.shape[1:3]
    out = []
    for i, j in np.ndindex(size, size):
        down = slice(math.floor(i * rows / size), math.ceil((i + 1) * rows / size))
        right = slice(math.floor(j * columns / size), math.ceil((j + 1) * columns / size))
        out.append(x[:, down, right].mean((1, 2)))
    return np.stack(out, axis=1)


def reference(w, config, problem: Problem):
    x = problem.x.reshape(len(problem.x), *problem.grid, -1)
    if config.reduction == "pool":
        one = {"kernel": w["reduce"]["kernel"][0, 0], "bias": w["reduce"]["bias"]}
        small = normal(w["norm"], linear(one, shares(x, config.size)))
        small = small / 2 * (1 + np.vectorize(math.erf)(small / math.sqrt(2)))
    elif config.ratio == 1:
        small = problem.x
    else:
        small = normal(w["norm"], convolved(w["reduce"], x, config.ratio))
    return multihead(
        w["attention"],
        problem._replace(context=small),
        lambda q, k, v: exact(q, k, v, np.ones((1, 1, 1, 1), bool)),
    )
