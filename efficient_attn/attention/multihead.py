"""Projections around a core: the usual multi-head layer, written once for every mechanism."""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from efficient_attn.attention.base import Choice, Core, Cost, Mixer, Site, refuse_mask
from efficient_attn.config import require
from efficient_attn.layers.positions import rotate


class MultiHead(Mixer):
    """Concat(heads) W_o, head_h = core(x W_q, y W_k, y W_v), y the context (1706.03762, 3.2.2)."""

    paper = "Attention Is All You Need, arXiv 1706.03762"

    def __init__(self, core: Core, *, capabilities: frozenset[str], rngs: nnx.Rngs):
        site = core.site
        require(
            not site.rotary or site.head_dim % 2 == 0,
            f"rotary positions need an even head width, not {site.head_dim}; change heads or width",
        )
        keys = core.kv_heads * site.head_dim
        self.core = core
        self.allowed = capabilities
        self.query = linear(site.width, site, rngs=rngs)
        self.key = linear(keys, site, rngs=rngs)
        self.value = linear(keys, site, rngs=rngs)
        self.out = linear(site.width, site, rngs=rngs)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Attend from x to the context, or to x itself."""
        refuse_mask(type(self.core).__name__, mask, self.allowed)
        q, k, v = self.project(x, context, positions)
        return self.out(_join(self.core(q, k, v, mask=mask, shared=shared)))

    def project(self, x, context=None, positions=None):
        """Queries [B,T,H,D], keys and values [B,S,G,D]."""
        dim = self.core.site.head_dim
        source = x if context is None else context
        q, k, v = (
            _split(f(y), dim)
            for f, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        if self.core.site.rotary and context is None:
            positions = jnp.arange(x.shape[1])[None] if positions is None else positions
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, v

    def init_state(self, batch: int, dtype: Any):
        """The core's state."""
        return self.core.init_state(batch, dtype)

    def step(self, x, state, *, position):
        """One token through the projections and the core's step."""
        q, k, v = self.project(x, positions=position[:, None])
        out, state = self.core.step(q, k, v, state, position=position)
        return self.out(_join(out)), state


def make_mixer(
    choice: Choice, site: Site, *, rngs: nnx.Rngs, shared: dict[str, nnx.Module]
) -> Mixer:
    """The mixer that `choice` names: itself, or a `MultiHead` around its core."""
    made = choice.mechanism(choice.config, site, rngs=rngs, shared=shared)  # type: ignore[call-arg]
    if isinstance(made, Core):
        return MultiHead(made, capabilities=choice.mechanism.capabilities(choice.config), rngs=rngs)
    return made  # type: ignore[return-value]


def mixer_cost(choice: Choice, site: Site, length: int) -> Cost:
    """Cost of the whole mixer at `length` tokens of self-attention, projections included."""
    inside = choice.mechanism.cost(choice.config, site, length)
    if not issubclass(choice.mechanism, Core):
        return inside
    keys = (getattr(choice.config, "kv_heads", None) or site.heads) * site.head_dim
    projections = 2 * length * site.width * (site.width + keys)
    return inside._replace(multiply_adds=inside.multiply_adds + projections)


def linear(out: int, site: Site, *, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
    """A projection from the site's width, as every mixer's: Xavier uniform, the site's dtype."""
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(
        site.width, out, use_bias=use_bias, kernel_init=init, dtype=site.dtype, rngs=rngs
    )


def _split(x, dim: int):
    return rearrange(x, "b t (h d) -> b t h d", d=dim)


def _join(x):
    return rearrange(x, "b t h d -> b t (h d)")
