"""Exact attention within the windows of a picture."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from efficient_attn.attention.base import Core, Cost, on_map
from efficient_attn.config import at_least, require
from kernels.dispatch import Path, run
from kernels.masked_softmax import masked_softmax


class Window(Core):
    """softmax(q k^T / sqrt(D) + b) v within windows that tile the picture (Swin, 2103.14030).

    Shifted windows (section 3.2) begin `shift` rows and columns later: those at the edges are cut.
    They are computed as the paper computes them: the picture is turned around by `shift`, so that
    there are no more windows than without, and places of a window that did not touch before are
    hidden from each other. b_h (equation 4) is learned for each of the distances in a window.

    As in the released code a window that is larger than the picture is cut to it, and along that
    side nothing is shifted. Where windows do not tile the picture, its last ones are cut. (The
    released code fills them up with zeros, which then are keys and take weight.)
    """

    @dataclass(frozen=True)
    class Config:
        """window: side of a square window, M; the paper's 7.
        shift: how far the windows stand from the first row and column; the paper's 0 and M // 2 in
        turn.
        bias: "relative", b, one learned number for each distance and head; "none".
        """

        window: int = 7
        shift: int = 0
        bias: Literal["relative", "none"] = "relative"

        def __post_init__(self):
            at_least(self, 1, "window")
            require(
                0 <= self.shift < self.window,
                f"shift={self.shift} is not in [0, {self.window}), the window",
            )

    paper = "Swin Transformer, arXiv 2103.14030"
    supports = frozenset({"bidirectional", "grid"})
    on_grids = True

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs, shared=shared)
        self.sides = _sides(config, site)
        self.shifts = tuple(0 if side <= config.window else config.shift for side in site.sides)
        if config.bias == "relative":
            rows, columns = self.sides
            shape = ((2 * rows - 1) * (2 * columns - 1), site.heads)
            init = nnx.initializers.truncated_normal(0.02)
            self.table = nnx.Param(init(rngs.params(), shape))

    @classmethod
    def cost(cls, config, site, length):
        """2 E for each pair of places in a window; linear in the length."""
        sides = _sides(config, site)
        filled = np.prod([-(-n // m) * m for n, m in zip(site.sides, sides, strict=True)])
        return Cost(2 * int(filled) * sides[0] * sides[1] * site.width, None)

    def __call__(self, q, k, v, *, mask, shared):
        """All windows at once, their logits float32."""
        mask.check(q.shape[1], k.shape[1])
        return run("window", self.site.backend, {"xla": Path(self._xla)}, (q, k, v), {})

    def _xla(self, q, k, v):
        q, k, v = self._cut(q), self._cut(k), self._cut(v)
        logits = jnp.einsum("bnthd,bnshd->bnhts", q, k, preferred_element_type=jnp.float32)
        logits = logits * self.site.head_dim**-0.5
        if self.config.bias == "relative":
            logits = logits + self._bias()[None, None]
        pieces = self._pieces()
        if (pieces == pieces[:, :1]).all():
            weights = jax.nn.softmax(logits)
        else:
            seen = pieces[:, :, None] == pieces[:, None, :]
            weights = masked_softmax(logits, jnp.asarray(seen)[None, :, None])
        return self._join(jnp.einsum("bnhts,bnshd->bnthd", weights.astype(v.dtype), v))

    def _cut(self, x):
        """[B,T,H,D] -> [B,N,M*M,H,D], the windows of the picture turned around by the shifts."""
        (rows, columns), x = self.sides, on_map(x, self.site)
        fill = [(0, -side % size) for side, size in zip(self.site.sides, self.sides, strict=True)]
        x = jnp.pad(x, [(0, 0), *fill, (0, 0), (0, 0)])
        x = jnp.roll(x, [-shift for shift in self.shifts], axis=(1, 2))
        return rearrange(x, "b (n r) (m c) h d -> b (n m) (r c) h d", r=rows, c=columns)

    def _join(self, x):
        """What `_cut` cut, as it was."""
        (height, width), (rows, columns) = self.site.sides, self.sides
        across = -(-width // columns)
        x = rearrange(x, "b (n m) (r c) h d -> b (n r) (m c) h d", m=across, r=rows)
        x = jnp.roll(x, self.shifts, axis=(1, 2))[:, :height, :width]
        return x.reshape(x.shape[0], height * width, *x.shape[3:])

    def _bias(self):
        """b [H,M*M,M*M]: the learned numbers by the distance of query and key."""
        rows, columns = self.sides
        r, c = (at.ravel() for at in np.indices(self.sides))
        down = r[:, None] - r[None, :] + rows - 1
        right = c[:, None] - c[None, :] + columns - 1
        return jnp.moveaxis(self.table[...][down * (2 * columns - 1) + right], -1, 0)

    def _pieces(self) -> np.ndarray:
        """[N,M*M]: a number for each place; places of a window see each other if theirs agree."""
        down, right = (
            _pieces_of(*given)
            for given in zip(self.site.sides, self.sides, self.shifts, strict=True)
        )
        both = down[:, None] * (right.max() + 1) + right[None, :]
        rows, columns = self.sides
        return rearrange(both, "(n r) (m c) -> (n m) (r c)", r=rows, c=columns)


def _sides(config: Window.Config, site) -> tuple[int, int]:
    """Rows and columns of a window: no more than the picture has."""
    rows, columns = site.sides
    return min(config.window, rows), min(config.window, columns)


def _pieces_of(side: int, size: int, shift: int) -> np.ndarray:
    """Which window each place lies in along one axis, after turning, from 1; 0 beyond the end."""
    at = np.roll(np.arange(-(-side // size) * size), -shift)
    return np.where(at < side, (at - shift) // size + 2, 0)
