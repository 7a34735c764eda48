"""Attention with a bias for every offset: what the contract runs, and its float64 reference."""

import numpy as np

from tests.attention.oracles import Problem, exact

LEVIT = "biased(key_dim=4, ratio=2.0, norm='batchnorm', activation='hardswish')"
VARIANTS = {
    "biased": 32 * 96 + 96 + 32 * 32 + 32 + 4 * 100,
    # 4 heads with keys of 4 and values of 8; scales and shifts of both norms
    LEVIT: 32 * 64 + 2 * 64 + 32 * 32 + 2 * 32 + 4 * 100,
    "biased(heads=3, key_dim=5, ratio=1.6)": 32 * 54 + 54 + 24 * 32 + 32 + 3 * 100,
}


def project(w, x):
    x = x @ w["linear"]["kernel"] + w["linear"].get("bias", 0.0)
    if "norm" not in w:
        return x
    norm = w["norm"]["norm"]
    return (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]


def reference(w, config, problem: Problem):
    """Head h's part of the projection holds its query, its key, its value, in that order."""
    heads, (rows, columns) = config.heads or problem.heads, problem.grid
    dim = config.key_dim or problem.x.shape[-1] // problem.heads
    both = project(w["qkv"], problem.x).reshape(*problem.x.shape[:2], heads, -1)
    q, k, v = both[..., :dim], both[..., dim : 2 * dim], both[..., 2 * dim :]
    bias = np.zeros((1, heads, rows * columns, rows * columns))
    places = list(np.ndindex(rows, columns))
    for t, s in np.ndindex(len(places), len(places)):
        down, right = (abs(places[t][axis] - places[s][axis]) for axis in (0, 1))
        bias[0, :, t, s] = w["biases"][:, down * columns + right]
    out = exact(q, k, v, problem.seen(), bias=bias).reshape(*problem.x.shape[:2], -1)
    if config.activation == "hardswish":
        out = out * np.clip(out + 3, 0, 6) / 6
    return project(w["out"], out)
