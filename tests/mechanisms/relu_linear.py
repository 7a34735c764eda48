"""ReLU linear attention at several scales: what the contract runs, and its float64 reference."""

import numpy as np

from tests.attention.oracles import Problem, linear

QKV = 32 * 96 + 96
VARIANTS = {
    "relu_linear": QKV + (25 * 96 + 96) + (8 * 96 + 96) + 64 * 32,
    "relu_linear(scales=(3, 5))": QKV + 34 * 96 + 2 * (8 * 96 + 2 * 96) + 96 * 32,
    "relu_linear(scales=())": QKV + 32 * 32,
}


def uncounted(config, length):
    """The windows: on a CPU sums of shifted products."""
    return length * 96 * sum(scale**2 for scale in config.scales)


def windows(w, x, dim):
    """Each channel's window of x [B,R,C,E], zeros around, then groups of `dim` channels mixed."""
    kernel, (rows, columns) = w["depthwise"]["kernel"], x.shape[1:3]
    reach = kernel.shape[0] // 2
    out = np.zeros_like(x)
    for r, c, i, j in np.ndindex(rows, columns, *kernel.shape[:2]):
        there = (r + i - reach, c + j - reach)
        if 0 <= there[0] < rows and 0 <= there[1] < columns:
            out[:, r, c] += kernel[i, j, 0] * x[:, *there]
    out = out + w["depthwise"]["bias"]
    mixed = np.zeros_like(out)
    for start in range(0, x.shape[-1], dim):
        group = slice(start, start + dim)
        mixed[..., group] = out[..., group] @ w["pointwise"]["kernel"][0, 0, :, group]
    return mixed + w["pointwise"]["bias"]


def reference(w, config, problem: Problem):
    batch, length, width = problem.x.shape
    dim = width // problem.heads
    made = linear(w["qkv"], problem.x).reshape(batch, *problem.grid, 3 * width)
    # as nnx.List has its members: by number
    parts = [made] + [windows(w["scales"][i], made, dim) for i in range(len(config.scales))]
    outs = []
    for part in parts:
        q, k, v = np.moveaxis(part.reshape(batch, length, problem.heads, 3, dim), 3, 0)
        weights = np.einsum("bthd,bshd->bhts", np.maximum(q, 0), np.maximum(k, 0))
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-5)
        outs.append(np.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width))
    return np.concatenate(outs, axis=-1) @ w["out"]["kernel"]
