"""What cost tables compare with: softmax with all its weights in memory, and no attention at all.

Neither is a mechanism to be used, so neither is in `attention.MIXERS`.
"""

import jax
import jax.numpy as jnp

from efficient_attn.attention.base import Core, Mechanism


class Materialised(Core):
    """softmax(q k^T / sqrt(D)) v with T^2 weights a head written out, and kept for the backward.

    What published tables call the Transformer. `kernels.softmax_attention` never holds as much.
    """

    paper = "Attention Is All You Need, arXiv 1706.03762"
    supports = frozenset({"bidirectional"})

    def __call__(self, q, k, v, *, mask, shared):
        """No mask: queries see all keys."""
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


class Identity(Core):
    """The values untouched: what is left of a layer when attention costs nothing.

    The bound "X (OPT)" of Performer's figure 3.
    """

    paper = "Rethinking Attention with Performers, arXiv 2009.14794"
    supports = frozenset({"bidirectional"})

    def __call__(self, q, k, v, *, mask, shared):
        """v [B,T,H,D]."""
        return v


BASELINES: dict[str, type[Mechanism]] = {"materialised": Materialised, "identity": Identity}
"""By the names that `measures.cost` knows beside those of `attention.MIXERS`."""
