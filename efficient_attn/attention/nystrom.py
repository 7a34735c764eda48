"""Nystromformer: softmax attention through a few landmarks and a pseudo-inverse."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.attention.base import Core, Cost
from efficient_attn.config import at_least, require
from kernels import Mask, local_conv, softmax_attention
from kernels.masked_softmax import masked_softmax

EXACT = jax.lax.Precision.HIGHEST
_products = functools.partial(jnp.einsum, precision=EXACT)


class Nystrom(Core):
    """softmax(q K~^T) Z softmax(Q~ k^T) v + conv(v), Z ~ softmax(Q~ K~^T)^+ (2102.03902).

    The landmarks Q~ and K~ are means over segments of neighbours. Segments hold equal shares of the
    tokens that are not padding, so a masked sequence gives what it gives without the masked tokens
    (the convolution apart, to which they are zeros). Logits, Z and what it multiplies are float32.
    Not causal: each landmark mixes its whole segment. The released code scales the start of the
    pseudo-inverse by a maximum over the whole batch; here it is each head's own.
    """

    @dataclass(frozen=True)
    class Config:
        """landmarks: m, the number of segments; the paper's 64. A sequence of no more tokens has
        each for a landmark, and gives softmax attention as far as the pseudo-inverse has converged.
        iterations: steps of the pseudo-inverse; the paper's 6. Softmax of landmarks that are much
        alike is nearly singular and would need more.
        kernel: taps of the depthwise convolution that skips from the values to the output, one set
        per head, an odd number; None leaves it out.
        """

        landmarks: int = 64
        iterations: int = 6
        kernel: int | None = 33

        def __post_init__(self):
            at_least(self, 1, "landmarks", "iterations")
            require(
                self.kernel is None or (self.kernel > 0 and self.kernel % 2 == 1),
                f"kernel={self.kernel} must be a positive odd number, or None for no convolution",
            )

    paper = "Nystromformer: A Nystrom-Based Algorithm for Self-Attention, arXiv 2102.03902"
    supports = frozenset({"padding", "bidirectional"})

    def __init__(self, config, site, *, rngs, shared):
        super().__init__(config, site, rngs=rngs, shared=shared)
        if config.kernel is not None:
            bound = config.kernel**-0.5
            shape = (site.heads, config.kernel)
            draw = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
            self.kernel = nnx.Param(draw)

    @classmethod
    def cost(cls, config, site, length):
        """4 T m E, m^2 E twice, and four products of m x m matrices per iteration and head."""
        landmarks = min(config.landmarks, length)
        inverse = 4 * config.iterations * site.heads * landmarks**3
        return Cost(site.width * (4 * length * landmarks + 2 * landmarks**2) + inverse, None)

    def __call__(self, q, k, v, *, mask, shared):
        """In float32, but for what landmarks gather of the values, which has their dtype."""
        landmarks = min(self.config.landmarks, q.shape[1])
        valid = jnp.ones(k.shape[:2], bool) if mask.keys is None else mask.keys
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        segment = segments(valid, landmarks)
        (q_marks, k_marks), alive = zip(
            *(segment_means(x, segment, valid, landmarks) for x in wide[:2]), strict=True
        )
        alive = alive[0]
        scale = self.site.head_dim**-0.5
        far = _products("bthd,bmhd->bhtm", wide[0] * scale, k_marks)
        far = masked_softmax(far, alive[:, None, None])
        both = alive[:, None, None, :] & alive[:, None, :, None]
        middle = masked_softmax(_products("bmhd,bnhd->bhmn", q_marks * scale, k_marks), both)
        near = softmax_attention(
            q_marks.astype(v.dtype), k, v, mask=Mask(keys=valid), backend=self.site.backend
        )
        inverse = pseudo_inverse(middle, self.config.iterations)
        mixed = _products("bhmn,bnhd->bmhd", inverse, near.astype(jnp.float32))
        out = _products("bhtm,bmhd->bthd", far, mixed)
        return (out + self._skip(wide[2], mask)).astype(v.dtype)

    def _skip(self, v, mask):
        """The values convolved along the sequence, padding zero; 0 without a convolution."""
        if self.config.kernel is None:
            return jnp.zeros((), v.dtype)
        flat, weights = rearrange(v, "b t h d -> b t (h d)"), self.kernel[...][None, None]
        out = local_conv(flat, weights, mask=Mask(keys=mask.keys))
        return out.reshape(v.shape)


def segments(valid: Bool[Array, "B T"], count: int) -> Int[Array, "B T"]:
    """The segment, 0 to count - 1, of each valid token: token r of n is in segment r count // n.

    With n tokens or fewer than `count`, each has one of its own.
    """
    rank = jnp.cumsum(valid, axis=1) - 1
    total = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    return jnp.maximum(rank, 0) * count // total


def segment_means(
    x: Float[Array, "B T H D"], segment: Int[Array, "B T"], valid: Bool[Array, "B T"], count: int
) -> tuple[Float[Array, "B M H D"], Bool[Array, "B M"]]:
    """Means over the valid tokens of each segment, 0 where there are none, and where there are."""

    def one(x, segment, valid):
        total = jax.ops.segment_sum(jnp.where(valid[:, None, None], x, 0), segment, count)
        return total, jax.ops.segment_sum(valid.astype(x.dtype), segment, count)

    total, number = jax.vmap(one)(x, segment, valid)
    return total / jnp.maximum(number, 1)[..., None, None], number > 0


def pseudo_inverse(matrix: Float[Array, "... M M"], iterations: int) -> Float[Array, "... M M"]:
    """Z_n of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, Z_0 = A^T / (|A|_1 |A|_inf).

    Tends to the Moore-Penrose inverse of A with the third power of the error (2102.03902).
    Rows and columns of zeros stay zeros.
    """
    size = jnp.abs(matrix)
    norm = jnp.max(jnp.sum(size, -1), -1) * jnp.max(jnp.sum(size, -2), -1)
    start = jnp.swapaxes(matrix, -1, -2) / jnp.where(norm > 0, norm, 1)[..., None, None]
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    times = lambda a, b: jnp.matmul(a, b, precision=EXACT)  # noqa: E731

    def step(_, z):
        az = times(matrix, z)
        return times(z, 13 * eye - times(az, 15 * eye - times(az, 7 * eye - az))) / 4

    return jax.lax.fori_loop(0, iterations, step, start)
