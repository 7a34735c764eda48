"""Projections around a core: the usual multi-head layer, written once for every mechanism."""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from efficient_attn.attention.base import (
    Choice,
    Core,
    Cost,
    Mixer,
    Site,
    kv_heads,
    refuse_context,
    refuse_mask,
)
from efficient_attn.config import require
from efficient_attn.layers.positions import rotate


class MultiHead(Mixer):
    """Concat(heads) W_o, head_h = core(x W_q, y W_k, y W_v), y the context (1706.03762, 3.2.2)."""

    paper = "Attention Is All You Need, arXiv 1706.03762"

    def __init__(self, core: Core, *, capabilities: frozenset[str], rngs: nnx.Rngs):
        site = core.site
        require(
            site.positions != "rotary" or site.head_dim % 2 == 0,
            f"rotary positions need an even head width, not {site.head_dim}; change heads or width",
        )
        keys = core.kv_heads * site.head_dim
        self.core = core
        self.allowed = capabilities
        self.query = linear(site.width, site, use_bias=site.qkv_bias, rngs=rngs)
        self.key = linear(keys, site, use_bias=site.qkv_bias, rngs=rngs)
        self.value = linear(keys, site, use_bias=site.qkv_bias, rngs=rngs)
        self.out = linear(site.width, site, rngs=rngs)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Attend from x to the context, or to x itself."""
        if "cross" not in self.allowed:
            refuse_context(type(self.core).__name__, context)
        if context is None:
            q, k, v = self.project(x, positions)
        else:
            q, (k, v) = self._heads(self.query(x)), self._keys_and_values(context)
        return self.attend(q, k, v, mask, shared)

    def project(self, x, positions=None):
        """Queries [B,T,H,D], keys and values [B,T,G,D] of self-attention."""
        q, (k, v) = self._heads(self.query(x)), self._keys_and_values(x)
        if self.core.site.positions == "rotary":
            positions = jnp.arange(x.shape[1])[None] if positions is None else positions
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, v

    def init_cross(self, context, *, mask, shared):
        """What the core keeps of the context's keys and values."""
        refuse_mask(type(self.core).__name__, mask, self.allowed)
        return self.core.init_cross(*self._keys_and_values(context), mask=mask, shared=shared)

    def cross(self, x, memory, *, shared):
        """Attend from x to what the core kept."""
        return self.out(_join(self.core.cross(self._heads(self.query(x)), memory, shared=shared)))

    def attend(self, q, k, v, mask, shared):
        """What `project` gave through the core and the last projection: [B,T,E]."""
        refuse_mask(type(self.core).__name__, mask, self.allowed)
        return self.out(_join(self.core(q, k, v, mask=mask, shared=shared)))

    def _keys_and_values(self, x):
        return self._heads(self.key(x)), self._heads(self.value(x))

    def _heads(self, x):
        return rearrange(x, "b t (h d) -> b t h d", d=self.core.site.head_dim)

    def init_state(self, batch: int, dtype: Any):
        """The core's state."""
        return self.core.init_state(batch, dtype)

    def step(self, x, state, *, position):
        """One token through the projections and the core's step."""
        q, k, v = self.project(x, position[:, None])
        out, state = self.core.step(q, k, v, state, position=position)
        return self.out(_join(out)), state

    def prefill(self, x, state, *, keys):
        """The prompt through the projections and the core's prefill."""
        out, state = self.core.prefill(*self.project(x), state, keys=keys)
        return self.out(_join(out)), state


def make_mixer(
    choice: Choice, site: Site, *, rngs: nnx.Rngs, shared: dict[str, nnx.Module]
) -> Mixer:
    """The mixer that `choice` names: itself, or a `MultiHead` around its core.

    Raises:
        UserError: options that do not fit the site; a mixer of pictures where there is none.
    """
    refuse_sequences(choice, site)
    made = choice.mechanism(choice.config, site, rngs=rngs, shared=shared)  # type: ignore[call-arg]
    if isinstance(made, Core):
        return MultiHead(made, capabilities=choice.mechanism.capabilities(choice.config), rngs=rngs)
    return made  # type: ignore[return-value]


def refuse_sequences(choice: Choice, site: Site) -> None:
    """Raise UserError for a mixer of pictures where there is none."""
    require(
        site.grid is not None or not choice.mechanism.on_grids,
        f"{choice} mixes the rows and columns of a picture, and the sequence of this model is "
        "none: use it in an image model, without a class token (model.pool='mean')",
    )


def mixer_cost(choice: Choice, site: Site, length: int) -> Cost:
    """Cost of the whole mixer at `length` tokens of self-attention, projections included."""
    inside = choice.mechanism.cost(choice.config, site, length)
    if not issubclass(choice.mechanism, Core):
        return inside
    keys = kv_heads(choice.config, site) * site.head_dim
    projections = 2 * length * site.width * (site.width + keys)
    return inside._replace(multiply_adds=inside.multiply_adds + projections)


def linear(out: int, site: Site, *, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
    """A projection from the site's width, as every mixer's: Xavier uniform, the site's dtype."""
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(
        site.width, out, use_bias=use_bias, kernel_init=init, dtype=site.dtype, rngs=rngs
    )


def _join(x):
    return rearrange(x, "b t h d -> b t (h d)")
