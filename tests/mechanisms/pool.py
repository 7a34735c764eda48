"""Average pooling: what the contract runs, and its float64 reference."""

import numpy as np

from tests.attention.oracles import Problem

VARIANTS = {"pool": 0, "pool(size=5)": 0}


def uncounted(config, length):
    """The sums: nothing is multiplied."""
    return length * config.size**2 * 32


def reference(w, config, problem: Problem):
    rows, columns = problem.grid
    x = problem.x.reshape(len(problem.x), rows, columns, -1)
    out, reach = np.zeros_like(x), config.size // 2
    for r, c in np.ndindex(rows, columns):
        around = [
            x[:, i, j]
            for i in range(r - reach, r + reach + 1)
            for j in range(c - reach, c + reach + 1)
            if 0 <= i < rows and 0 <= j < columns
        ]
        out[:, r, c] = np.mean(around, axis=0) - x[:, r, c]
    return out.reshape(problem.x.shape)
