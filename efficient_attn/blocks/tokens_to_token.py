"""Tokens to token (T2T-ViT, arXiv 2101.11986, section 3.1): patches that overlap, three times."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_attn.attention.base import Buffer
from efficient_attn.layers.mlp import Mlp
from efficient_attn.layers.norm import make_norm
from kernels import softmax_attention
from kernels.dispatch import Backend

TokenKind = Literal["performer", "transformer"]
EPSILON = 1e-8


class TokensToToken(nnx.Module):
    """[B,H,W,C] -> [B,h,w,`width`], h about H / 16: split 7 x 7 every 4, attend, split 3 x 3 every
    2, attend, split 3 x 3 every 2, project (figure 4). `inner` is the width of the attention.
    """

    def __init__(
        self, channels: int, inner: int, width: int, *, kind: TokenKind, dtype: Any,
        backend: Backend, rngs: nnx.Rngs,
    ):  # fmt: skip
        given = {"kind": kind, "dtype": dtype, "backend": backend, "rngs": rngs}
        self.blocks = nnx.List(
            [TokenBlock(49 * channels, inner, **given), TokenBlock(9 * inner, inner, **given)]
        )
        self.project = nnx.Linear(9 * inner, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None
    ) -> Float[Array, "B h w E"]:
        """Without `rngs` nothing is dropped."""
        x = soft_split(x, 7, stride=4, around=2)
        for block in self.blocks:
            tokens = block(x.reshape(x.shape[0], -1, x.shape[-1]), rngs=rngs)
            x = soft_split(tokens.reshape(*x.shape[:3], -1), 3, stride=2, around=1)
        return self.project(x)


class TokenBlock(nnx.Module):
    """y = v + W attention(q, k, v); y + mlp(norm(y)), with q, k, v from norm(x) (equation 1).

    The values take the place of x in the residual, since x is wider. One head. As released:
    "transformer" is softmax(q k^T / sqrt(width of x)) v, its projections without biases;
    "performer" estimates softmax(q k^T) v by out / 2 positive random features, orthogonal, of
    length sqrt(their number), with 1e-8 added to the normaliser; a tenth of what is added is
    dropped in training. Features are at most exp(R / 2), R their number, and cannot overflow.
    """

    def __init__(
        self, width: int, out: int, *, kind: TokenKind, dtype: Any, backend: Backend,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        given = {"dtype": dtype, "rngs": rngs}
        self.kind: TokenKind = kind
        self.scale = width**-0.5
        self.backend: Backend = backend
        self.norm = make_norm("layernorm", width, epsilon=1e-5, **given)
        self.enter = nnx.Linear(width, 3 * out, use_bias=kind == "performer", **given)
        self.leave = nnx.Linear(out, out, **given)
        self.mlp_norm = make_norm("layernorm", out, epsilon=1e-5, **given)
        self.mlp = Mlp(out, out, kind="gelu_exact", dropout=0.0, **given)
        self.dropout = nnx.Dropout(0.1 if kind == "performer" else 0.0)
        if kind == "performer":
            rows = out // 2
            drawn = jax.random.orthogonal(rngs.params(), out)[:rows]
            self.projection = Buffer(drawn * rows**0.5)

    def __call__(self, x: Float[Array, "B T C"], *, rngs: nnx.Rngs | None) -> Float[Array, "B T E"]:
        """Without `rngs` nothing is dropped."""
        parts = jnp.split(self.enter(self.norm(x)), 3, axis=-1)
        if self.kind == "performer":
            k, q, v = parts
            y = self._estimate(q, k, v)
        else:
            q, k, v = (part[:, :, None] for part in parts)
            y = softmax_attention(q, k, v, scale=self.scale, backend=self.backend)[:, :, 0]
        v = parts[2]
        y = v + self._dropped(self.leave(y), rngs)
        return y + self._dropped(self.mlp(self.mlp_norm(y), rngs=rngs), rngs)

    def _estimate(self, q, k, v):
        """phi(q) (phi(k)^T v) / (phi(q) sum phi(k) + 1e-8), phi(x) = exp(W x - |x|^2 / 2), float32.

        phi is over the square root of the number of features, as the constant is not.
        """
        q, k = self._features(q), self._features(k)
        total = jnp.einsum("btr,br->bt", q, jnp.sum(k, axis=1))
        state = jnp.einsum("bsr,bsd->brd", k, v.astype(jnp.float32))
        out = jnp.einsum("btr,brd->btd", q, state) / (total + EPSILON)[..., None]
        return out.astype(v.dtype)

    def _features(self, x):
        x, w = x.astype(jnp.float32), self.projection[...]
        logits = jnp.einsum("btd,rd->btr", x, w) - jnp.sum(x**2, axis=-1, keepdims=True) / 2
        return jnp.exp(logits) * len(w) ** -0.5

    def _dropped(self, x, rngs):
        return self.dropout(x, deterministic=rngs is None, rngs=rngs)


def soft_split(
    x: Float[Array, "B H W C"], side: int, *, stride: int, around: int
) -> Float[Array, "B h w F"]:
    """Squares of `side`, every `stride`, of x with `around` zeros at its edges; F = C * side^2.

    Channels come first in F, then the square's rows and columns.
    """
    edge = (around, around)
    x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    h, w = ((size - side) // stride + 1 for size in x.shape[1:3])
    parts = [
        x[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
        for i in range(side)
        for j in range(side)
    ]
    return jnp.stack(parts, axis=-1).reshape(*parts[0].shape[:3], -1)
