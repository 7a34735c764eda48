"""Sliding-window attention (Longformer, arXiv 2004.05150, section 3.1; Mistral, arXiv 2310.06825).

A query at t sees the keys s with t - left <= s <= t + right; with dilation d, those of them with
t - s a multiple of d, the reach being d left and d right.
"""

import functools

import numpy as np
from jaxtyping import Array, Float

from kernels.block_attention import Blocks, Part, block_attention, compact, runs
from kernels.dispatch import Backend, Path, run
from kernels.fused import softmax as fused_softmax
from kernels.mask import Mask, check_heads

LARGEST, SMALLEST = 128, 16
"""Queries in a block: what the window reaches on one side, in multiples of the smaller."""


def window_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G Dv"],
    *,
    left: int,
    right: int,
    dilation: int = 1,
    mask: Mask | None = None,
    slopes: Float[Array, " H"] | None = None,
    backend: Backend = "auto",
) -> Part:
    """Attention to `left` keys before each query, itself, and `right` after it.

    See `block_attention` for grouped heads, slopes and errors. Blocks that lie wholly outside the
    window are not computed: T (left + right + C) logits a head, blocks of C queries.
    """
    mask = mask or Mask()
    mask.check(q.shape[1], k.shape[1])
    check_heads(q.shape[2], k)
    right = 0 if mask.causal else right
    how = {"left": left, "right": right, "dilation": dilation, "mask": mask, "slopes": slopes}
    paths = {"pallas": Path(fused_softmax.window, fused_softmax.refuse_window), "xla": Path(_xla)}
    return run("window_attention", backend, paths, (q, k, v), how)


def _xla(q, k, v, *, left: int, right: int, dilation: int, mask: Mask, slopes) -> Part:
    blocks = window_blocks(q.shape[1], left=left, right=right, dilation=dilation)
    return block_attention(q, k, v, blocks=blocks, mask=mask, slopes=slopes, backend="xla")


@functools.lru_cache(maxsize=64)
def window_blocks(length: int, *, left: int, right: int, dilation: int = 1) -> Blocks:
    """The window as blocks, those of one residue modulo the dilation side by side."""
    dilation, left, right = (min(x, length) for x in (dilation, left, right))
    each = -(-length // dilation)  # positions of one residue
    size = min(each, LARGEST, SMALLEST * max(1, -(-max(left, right) // SMALLEST)))
    order = runs(each, size)[None]
    at = order * dilation + np.arange(dilation)[:, None, None]
    at = np.where((order >= 0) & (at < length), at, -1).reshape(-1, size)
    count = order.shape[1]
    before, after = (min(count - 1, -(-reach // size)) for reach in (left, right))
    beside = np.arange(count)[:, None] + np.arange(-before, after + 1)[None]
    beside = np.where((beside >= 0) & (beside < count), beside, -1)[None]
    table = np.where(beside >= 0, beside + count * np.arange(dilation)[:, None, None], -1)
    return Blocks(
        queries=at, keys=at, table=compact(table.reshape(1, dilation * count, -1)),
        band=(left * dilation, right * dilation),
    )  # fmt: skip
