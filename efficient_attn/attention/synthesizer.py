"""Synthesizer: attention weights made without comparing tokens."""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from efficient_attn.attention.base import Cost, Mixer, refuse_context, refuse_mask
from efficient_attn.attention.multihead import linear
from efficient_attn.attention.synthesizer_parts import PARTS, Part
from efficient_attn.config import at_least, require
from kernels import Mask
from kernels.dispatch import Path, run
from kernels.masked_softmax import masked_softmax

DENSE_LOGITS = 1 << 20
"""Up to this many logits per head, T x S, are held at once; longer queries go chunk by chunk."""


class SynthesizerState(NamedTuple):
    """Values of the tokens so far, and their keys where "vanilla" is in the mixture."""

    values: Float[Array, "B S H D"]
    keys: Float[Array, "B S H D"] | None


class Synthesizer(Mixer):
    """softmax(a_1 S_1(x) + ... + a_N S_N(x)) v, the parts S_n of T x S logits (2005.00743).

    Every head has weights of its own. Column s of the logits belongs to position s, so shorter
    sequences use the first ones, and a sequence may be no longer than the site's. Quadratic in the
    length; logits are float32, and memory is linear as in softmax attention. Rotary positions turn
    the queries and keys of "vanilla".
    """

    @dataclass(frozen=True)
    class Config:
        """mixture: the parts, section 3 of the paper: "dense" W_2 relu(W_1 x_t + b_1) + b_2;
        "random" a learned S x S matrix; "fixed" one that is not learned; "factorised_dense" with
        entries A_(s // b) B_(s mod b), A and B from x_t as "dense", a b >= S; "factorised_random"
        R_1 R_2^T; "vanilla" q k^T / sqrt(D).
        weights: of the mixture: "learned", positive with sum 1, or "sum", as the released codes
        have it.
        hidden: width of relu(W_1 x) in each head; None is the head's.
        rank: columns of R_1 and R_2; the paper's 8.
        factor: a; None is the root of the length, rounded up.
        """

        mixture: tuple[Part, ...] = ("dense",)
        weights: Literal["learned", "sum"] = "learned"
        hidden: int | None = None
        rank: int = 8
        factor: int | None = None

        def __post_init__(self):
            parts = self.mixture
            require(
                len(parts) > 0 and len(set(parts)) == len(parts),
                f"mixture={parts} must name at least one part, and none twice",
            )
            at_least(self, 1, "rank")
            for name in ("hidden", "factor"):
                value = getattr(self, name)
                require(value is None or value > 0, f"{name}={value} must be positive")

    paper = "Synthesizer: Rethinking Self-Attention in Transformer Models, arXiv 2005.00743"
    supports = frozenset({"padding", "causal", "bidirectional", "decode"})

    def __init__(self, config, site, *, rngs, shared):
        self.config, self.site = config, site
        self.value = linear(site.width, site, rngs=rngs)
        self.out = linear(site.width, site, rngs=rngs)
        self.parts = nnx.Dict(
            {name: PARTS[name](config, site, rngs=rngs) for name in config.mixture}
        )
        if len(config.mixture) > 1 and config.weights == "learned":
            self.shares = nnx.Param(jnp.zeros(len(config.mixture)))

    @classmethod
    def cost(cls, config, site, length):
        """Projections, T^2 E for the average, and what the parts of the mixture take."""
        parts = sum(PARTS[name].cost(config, site, length) for name in config.mixture)
        caches = 2 if "vanilla" in config.mixture else 1
        return Cost(
            2 * length * site.width**2 + length**2 * site.width + parts,
            4 * caches * length * site.width,
        )

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused, and more tokens than the site's longest."""
        refuse_context("synthesizer", context)
        refuse_mask("synthesizer", mask, self.supports)
        if x.shape[1] > self.site.seq:
            raise ValueError(f"{x.shape[1]} tokens, but synthesizer was built for {self.site.seq}")
        mask.check(x.shape[1], x.shape[1])
        at = jnp.arange(x.shape[1])[None]
        values, keys = self._values(x), self._keys(x, at if positions is None else positions)
        rows = self._rows(x, at, at if positions is None else positions)
        return self._mix(rows, values, keys, mask)

    def init_state(self, batch, dtype):
        """Empty caches of the site's longest sequence."""
        shape = (batch, self.site.seq, self.site.heads, self.site.head_dim)
        keys = jnp.zeros(shape, dtype) if "vanilla" in self.config.mixture else None
        return SynthesizerState(jnp.zeros(shape, dtype), keys)

    def step(self, x, state, *, position):
        """Write this token's value (and key) at `position`, mix all up to it."""
        at, batch = position[:, None], jnp.arange(len(position))

        def write(cache, new):
            return cache.at[batch, position].set(new[:, 0].astype(cache.dtype))

        new = SynthesizerState(self._values(x), self._keys(x, at))
        state = jax.tree.map(write, state, new)
        seen = (jnp.arange(self.site.seq)[None] <= at)[:, None, None]
        rows = self._rows(x, at, at)
        return self._project(self._attend(rows, seen, state.values, state.keys)), state

    def prefill(self, x, state, *, keys):
        """All tokens at once; what lies behind a row's last one is overwritten by its steps."""
        at = jnp.arange(x.shape[1])[None]
        new = SynthesizerState(self._values(x), self._keys(x, at))
        start = (0, 0, 0, 0)
        state = jax.tree.map(
            lambda cache, part: jax.lax.dynamic_update_slice(
                cache, part.astype(cache.dtype), start
            ),
            state,
            new,
        )
        mask = Mask(causal=True, keys=keys)
        return self._mix(self._rows(x, at, at), new.values, new.keys, mask), state

    def _values(self, x):
        return rearrange(self.value(x), "b t (h d) -> b t h d", h=self.site.heads)

    def _keys(self, x, positions):
        if "vanilla" in self.config.mixture:
            return self.parts["vanilla"].keys(x, positions)
        return None

    def _rows(self, x, at, positions):
        """What each part's rows of logits are made of: arrays [B or 1, T, ...] by part."""
        return {
            name: self.parts[name].rows(x, positions if name == "vanilla" else at)
            for name in self.config.mixture
        }

    def _mix(self, rows, values, keys, mask: Mask):
        paths = {"xla": Path(self._xla)}
        out = run("synthesizer", self.site.backend, paths, (rows, values, keys, mask), {})
        return self._project(out)

    def _xla(self, rows, values, keys, mask: Mask):
        length = values.shape[1]
        chunk = max(1, DENSE_LOGITS // length)
        if length <= chunk:
            return self._attend(rows, mask.visible(jnp.arange(length), length), values, keys)
        chunks = -(-length // chunk)

        def cut(x):
            x = jnp.pad(x, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2))
            return rearrange(x, "b (n c) ... -> n b c ...", n=chunks)

        def one(given):
            rows, at = given
            return self._attend(rows, mask.visible(at, length), values, keys)

        at = jnp.minimum(jnp.arange(chunks * chunk), length - 1).reshape(chunks, chunk)
        out = jax.lax.map(jax.checkpoint(one), (jax.tree.map(cut, rows), at))
        return rearrange(out, "n b c h d -> b (n c) h d")[:, :length]

    def _attend(self, rows, seen: Bool[Array, "#B 1 #T S"], values, keys):
        """The output [B,T,H,D] of these rows of the logits."""
        columns = values.shape[1]
        parts = [self.parts[name].logits(rows[name], columns, keys) for name in self.config.mixture]
        if len(parts) > 1 and self.config.weights == "learned":
            shares = jax.nn.softmax(self.shares[...])
            parts = [shares[n] * part for n, part in enumerate(parts)]
        batch = max(len(values), *(len(part) for part in parts))
        same = [jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in parts]
        weights = masked_softmax(functools.reduce(jnp.add, same), seen)
        return jnp.einsum("bhts,bshd->bthd", weights.astype(values.dtype), values)

    def _project(self, out):
        return self.out(rearrange(out, "b t h d -> b t (h d)"))
