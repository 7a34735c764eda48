"""Each mechanism from its paper's formulas, in float64 numpy, loops and all; no code of ours.

A reference takes the mechanism's numbers (nested dicts, as `support.weights` gives them), its
options and a `Problem`, and returns the mixer's output [B, T, E].
"""

from typing import Any, NamedTuple

import numpy as np


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
    rotary: bool = False
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


def exact(q, k, v, seen, cap=None):
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
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
    if problem.rotary and problem.context is None:
        q, k = turned(q), turned(k)
    k, v = (np.repeat(y, heads // y.shape[2], axis=2) for y in (k, v))
    out = core(q, k, v)
    return linear(w["out"], out.reshape(*out.shape[:2], heads * dim))


def softmax(w, config, problem: Problem):
    def core(q, k, v):
        return exact(q, k, v, problem.seen(), config.logit_cap)

    return multihead(w, problem, core, config.kv_heads)


def linformer(w, config, problem: Problem):
    rank = config.rank or max(1, problem.seq // 4)
    window = -(-problem.seq // rank)

    def by_matrix(x, matrix):  # E [1 or H, R, S]
        rows = []
        for head in range(x.shape[2]):
            e = matrix[min(head, len(matrix) - 1)][:, : x.shape[1]]
            rows.append(
                np.stack([e @ (x[b, :, head] * problem.keys[b][:, None]) for b in range(len(x))])
            )
        return np.stack(rows, axis=2)

    def by_window(x, matrix):
        batch, length, heads, dim = x.shape
        out = np.zeros((batch, -(-length // window), heads, dim))
        for b, r, h in np.ndindex(*out.shape[:3]):
            at = range(r * window, min((r + 1) * window, length))
            inside = [s for s in at if problem.keys[b, s]]
            if inside and config.projection == "convolution":
                kernel = matrix[min(h, len(matrix) - 1)]
                out[b, r, h] = sum(x[b, s, h] @ kernel[s - r * window] for s in inside)
            elif inside:
                pool = {"mean": np.mean, "max": np.max}[config.projection]
                out[b, r, h] = pool(x[b, inside, h], axis=0)
        return out

    def core(q, k, v):
        project, e, f = by_window, None, None
        if config.projection in ("linear", "convolution"):
            held = w.get("core", {})
            if config.sharing == "layerwise":
                ((_, only),) = problem.shared.items()
                e = f = only["weight"]
            else:
                e = held["keys"]["weight"]
                f = e if config.sharing == "key-value" else held["values"]["weight"]
        if config.projection == "linear":
            project = by_matrix
        k, v = project(k, e), project(v, f)
        alive = np.repeat(problem.keys.any(1, keepdims=True), k.shape[1], axis=1)
        if config.projection != "linear":
            starts = range(0, problem.keys.shape[1], window)
            alive = np.stack([problem.keys[:, s : s + window].any(1) for s in starts], axis=1)
        return exact(q, k, v, alive[:, None, None, :])

    return multihead(w, problem, core)


def phi(x, w, config):
    """Features of one vector per row, naive exponentials: lemma 1 and section 2.3 of 2009.14794."""
    x = x / x.shape[-1] ** 0.25
    u = x if w is None else x @ w.T
    half_square = np.sum(x * x, axis=-1, keepdims=True) / 2
    rows = u.shape[-1]
    kind = config.feature_map
    if kind == "positive":
        return np.exp(u - half_square) / np.sqrt(rows)
    if kind == "hyperbolic":
        both = np.concatenate([np.exp(u - half_square), np.exp(-u - half_square)], axis=-1)
        return both / np.sqrt(2 * rows)
    if kind == "trigonometric":
        return np.exp(half_square) * np.concatenate([np.sin(u), np.cos(u)], axis=-1) / np.sqrt(rows)
    if kind == "relu":
        return np.maximum(u, 0.0) + config.epsilon
    if kind == "elu":
        return np.where(u > 0, u + 1.0, np.exp(np.minimum(u, 0.0)))
    raise NotImplementedError(f"write the formula of {kind} here")


def performer(w, config, problem: Problem):
    projection = w.get("core", {}).get("projection")

    def core(q, k, v):
        kernel = np.einsum(
            "bthr,bshr->bhts", phi(q, projection, config), phi(k, projection, config)
        )
        return average(np.where(problem.seen(), kernel, 0.0), v)

    return multihead(w, problem, core)


def lsra(w, config, problem: Problem):
    inner = config.attention
    half = problem.x.shape[-1] // 2
    far = REFERENCES[inner.name](
        w["attention"], inner.config, problem._replace(x=problem.x[..., :half])
    )
    near = linear(w["local"]["enter"], problem.x[..., half:])
    if config.gate == "glu":
        near = near[..., :half] / (1 + np.exp(-near[..., half:]))
    taps = config.kernel if isinstance(config.kernel, int) else None
    if taps is None:
        taps = config.kernel[min(problem.layer, len(config.kernel) - 1)]
    batch, length, heads = *problem.x.shape[:2], problem.heads
    if config.conv == "dynamic":
        kernels = near @ w["local"]["kernel"]["predict"]["kernel"]
        kernels = kernels.reshape(batch, length, heads, taps)
    else:
        one = w["local"]["kernel"]["weight"]
        kernels = np.broadcast_to(one, (batch, length, heads, taps))
    kernels = np.exp(kernels) / np.exp(kernels).sum(-1, keepdims=True)
    by_head = near.reshape(batch, length, heads, half // heads)
    out = np.zeros_like(by_head)
    before = taps - 1 if problem.causal else (taps - 1) // 2
    for b, t, tap in np.ndindex(batch, length, taps):
        s = t + tap - before
        if (
            0 <= s < length
            and problem.keys[b, s]
            and problem.segments[b, s] == problem.segments[b, t]
        ):
            out[b, t] += kernels[b, t, :, tap, None] * by_head[b, s]
    near = linear(w["local"]["leave"], out.reshape(batch, length, half))
    return np.concatenate([far, near], axis=-1)


REFERENCES = {"softmax": softmax, "linformer": linformer, "performer": performer, "lsra": lsra}
