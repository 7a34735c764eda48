"""What the float64 references of the mechanisms (`tests/mechanisms/`) are written with.

A reference takes the mechanism's numbers (nested dicts, as `support.weights` gives them), its
options and a `Problem`, and returns the mixer's output [B, T, E]: the paper's formula in numpy,
loops and all, without code of ours.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LINEARS = 4 * (32 * 32 + 32)
"""Parameters of the four projections of `MultiHead` at the tests' width."""


class Problem(NamedTuple):
    """What a mixer is given: x [B,T,E], a context or None, the mask, where it stands."""

    x: np.ndarray
    context: np.ndarray | None
    keys: np.ndarray
    segments: np.ndarray
    causal: bool
    heads: int
    seq: int
    layer: int = 0
    positions: str = "none"
    grid: tuple[int, int] | None = None
    shared: Any = None

    def seen(self) -> np.ndarray:
        """[B,1,T,S]: whether query t sees key s."""
        length, keys = self.x.shape[1], self.keys.shape[1]
        seen = np.repeat(self.keys[:, None, :], length, axis=1)
        if self.context is None:
            seen = seen & (self.segments[:, :, None] == self.segments[:, None, :])
        if self.causal:
            seen = seen & (np.arange(length)[:, None] >= np.arange(keys)[None, :])
        return seen[:, None]


def linear(w, x):
    return x @ w["kernel"] + w["bias"]


def average(weights, v):
    """[B,H,T,S] weights over values [B,S,H,D]; 0 where the weights are all 0."""
    total = weights.sum(-1, keepdims=True)
    shares = np.where(total == 0, 0.0, weights / np.where(total == 0, 1.0, total))
    return np.einsum("bhts,bshd->bthd", shares, v)


def alibi(problem: Problem):
    """-m_h |t - s| for heads as many as a power of 2 (2108.12409), [1,H,T,S]; 0 without ALiBi."""
    if problem.positions != "alibi":
        return np.zeros((1, 1, 1, 1))
    at = np.arange(problem.x.shape[1])
    slopes = 2.0 ** (-8 * np.arange(1, problem.heads + 1) / problem.heads)
    return -slopes[None, :, None, None] * np.abs(at[:, None] - at[None, :])[None, None]


def exact(q, k, v, seen, cap=None, bias=0.0):
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    logits = logits + bias
    return average(np.where(seen, np.exp(logits), 0.0), v)


def turned(x):
    """Rotary positions as multiplication by e^(i t theta), halves as real and imaginary parts."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def multihead(w, problem: Problem, core, kv_heads=None):
    heads = problem.heads
    dim = problem.x.shape[-1] // heads
    source = problem.x if problem.context is None else problem.context
    q = linear(w["query"], problem.x).reshape(*problem.x.shape[:2], heads, dim)
    k, v = (
        linear(w[name], source).reshape(*source.shape[:2], kv_heads or heads, dim)
        for name in ("key", "value")
    )
    if problem.positions == "rotary" and problem.context is None:
        q, k = turned(q), turned(k)
    k, v = (np.repeat(y, heads // y.shape[2], axis=2) for y in (k, v))
    out = core(q, k, v)
    return linear(w["out"], out.reshape(*out.shape[:2], heads * dim))


def reference_of(name: str) -> Callable[[Any, Any, Problem], np.ndarray]:
    """The reference of the mechanism `name`."""
    return importlib.import_module(f"tests.mechanisms.{name}").reference
