"""Reformer: attention among tokens that locality-sensitive hashing puts into one bucket."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from efficient_attn.attention.base import (
    Buffer,
    Cost,
    Mixer,
    redraw,
    refuse_context,
    refuse_mask,
)
from efficient_attn.attention.multihead import linear
from efficient_attn.config import at_least, require
from efficient_attn.layers.positions import rotate
from kernels import Mask
from kernels.lsh_attention import Layout, chunks, lsh_attention, ranks, unit
from kernels.masked_softmax import masked_softmax


class ReformerState(NamedTuple):
    """What decoding keeps of the tokens so far: keys of length 1, values, buckets and chunks."""

    keys: Float[Array, "B S H D"]
    values: Float[Array, "B S H D"]
    buckets: Int[Array, "B S H R"]
    chunks: Int[Array, "B S H R"]


class Reformer(Mixer):
    """Attention of q to q / |q| within buckets of an angular hash (Kitaev et al. 2001.04451).

    The bucket of q in a round is argmax([R q, -R q]), R drawn at random (equation 4's text). What a
    query sees, and how rounds are joined, is told in `kernels.lsh_attention`. In the paper chunks
    ignore where buckets begin, so that a token's chunk depends on tokens after it; the default
    layout begins a chunk with each bucket, and is strictly causal. Queries are projected in
    float32, since a bucket is a decision that rounding may change.
    """

    @dataclass(frozen=True)
    class Config:
        """rounds: of hashing, in training; the paper's 1 to 8.
        eval_rounds: of hashing without dropout's rngs, so in evaluation and decoding (table 2);
        None is `rounds`.
        chunk: places of a chunk, `m` in the paper.
        buckets: an even number; a tuple of them hashes each part by rotations of its own, and has
        their product of buckets; 1 does not hash. None is one bucket per chunk of the longest
        sequence, even and in two parts if they are more than 16. (The paper has two per chunk.)
        layout: "bucket", or the paper's "sorted", which is not causal.
        redraw: steps of training between two draws of the rotations; 0 keeps the first.
        """

        rounds: int = 4
        eval_rounds: int | None = None
        chunk: int = 64
        buckets: int | tuple[int, ...] | None = None
        layout: Layout = "bucket"
        redraw: int = 1

        def __post_init__(self):
            at_least(self, 1, "rounds", "chunk")
            at_least(self, 0, "redraw")
            require(
                self.eval_rounds is None or self.eval_rounds > 0,
                f"eval_rounds={self.eval_rounds} must be positive, or None for those of training",
            )
            parts = (self.buckets,) if isinstance(self.buckets, int) else self.buckets
            require(
                parts is None
                or parts == (1,)
                or (len(parts) > 0 and all(part > 0 and part % 2 == 0 for part in parts)),
                f"buckets={self.buckets} must be even numbers, or 1: half of the directions are "
                "the others turned round",
            )

    paper = "Reformer: The Efficient Transformer, arXiv 2001.04451"
    supports = frozenset({"padding", "causal", "bidirectional", "decode"})
    remedy = "layout='bucket'"

    def __init__(self, config, site, *, rngs, shared):
        require(
            site.positions != "rotary" or site.head_dim % 2 == 0,
            f"rotary positions need an even head width, not {site.head_dim}; change heads or width",
        )
        self.config, self.site = config, site
        self.allowed = self.capabilities(config)
        self.query = linear(site.width, replace(site, dtype=jnp.float32), rngs=rngs)
        self.query.precision = jax.lax.Precision.HIGHEST
        self.value = linear(site.width, site, rngs=rngs)
        self.out = linear(site.width, site, rngs=rngs)
        self.key = Buffer(jax.random.key_data(rngs.params()))
        self.rotations = Buffer(self._draw(0))

    @classmethod
    def capabilities(cls, config):
        """The sorted layout is not causal."""
        return cls.supports - ({"causal", "decode"} if config.layout == "sorted" else set())

    @classmethod
    def cost(cls, config, site, length):
        """Of evaluation: projections, hashes, and 4 C^2 D for each chunk of each round."""
        parts, rounds = _parts(config, site), config.eval_rounds or config.rounds
        chunk = min(config.chunk, length)
        size = chunks(length, count=math.prod(parts), chunk=chunk, layout=config.layout)
        attend = rounds * size * 4 * chunk**2 * site.width
        hashes = rounds * length * site.width * sum(part // 2 for part in parts)
        kept = 4 * length * (2 * site.width + 2 * site.heads * rounds)
        decodes = "decode" in cls.capabilities(config)
        return Cost(3 * length * site.width**2 + attend + hashes, kept if decodes else None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused."""
        refuse_context("reformer", context)
        refuse_mask("reformer", mask, self.allowed)
        q, v = self._project(x, jnp.arange(x.shape[1])[None] if positions is None else positions)
        rounds = self._eval_rounds if rngs is None else self.config.rounds
        return self._attend(q, v, self.hash(q, rounds), mask)

    def hash(self, q: Float[Array, "B T H D"], rounds: int) -> Int[Array, "R B T H"]:
        """The bucket of each query in each of the first `rounds` rounds."""
        found = jnp.zeros((rounds, *q.shape[:3]), jnp.int32)
        directions = sum(part // 2 for part in _parts(self.config, self.site))
        turned = jnp.einsum(
            "bthd,rhdf->rbthf", q, self.rotations[...][:rounds, ..., :directions],
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        start = 0
        for part in _parts(self.config, self.site):
            own = turned[..., start : start + part // 2]
            both = jnp.concatenate([own, -own], axis=-1)
            found = found * part + (jnp.argmax(both, axis=-1) if part > 1 else 0)
            start += part // 2
        return found

    def init_state(self, batch, dtype):
        """Empty caches of the site's longest sequence; keys are float32."""
        shape = (batch, self.site.seq, self.site.heads)
        if "decode" not in self.allowed:
            return super().init_state(batch, dtype)
        return ReformerState(
            jnp.zeros((*shape, self.site.head_dim)),
            jnp.zeros((*shape, self.site.head_dim), dtype),
            jnp.full((*shape, self._eval_rounds), -1, jnp.int32),
            jnp.zeros((*shape, self._eval_rounds), jnp.int32),
        )

    def step(self, x, state, *, position):
        """One token; it looks at all buckets so far, to see the few tokens of its own."""
        q, v = self._project(x, position[:, None])
        bucket = rearrange(self.hash(q, self._eval_rounds), "r b 1 h -> b 1 h r")
        past = (jnp.arange(self.site.seq)[None] < position[:, None])[:, :, None, None]
        same = past & (state.buckets == bucket)
        chunk = jnp.sum(same, axis=1, keepdims=True) // self.config.chunk
        seen = jnp.any(same & (state.chunks >= chunk - 1), axis=-1)
        seen = rearrange(seen, "b s h -> b h s")
        weights = masked_softmax(jnp.einsum("bhd,bshd->bhs", q[:, 0], state.keys), seen)
        out = jnp.einsum("bhs,bshd->bhd", weights.astype(v.dtype), state.values.astype(v.dtype))
        out = jnp.where(jnp.any(seen, axis=-1)[..., None], out, v[:, 0])
        rows, new = jnp.arange(len(position)), (unit(q), v, bucket, chunk)
        state = ReformerState(
            *(
                cache.at[rows, position].set(part[:, 0].astype(cache.dtype))
                for cache, part in zip(state, new, strict=True)
            )
        )
        return self._join(out[:, None]), state

    def prefill(self, x, state, *, keys):
        """All tokens at once; a chunk is counted by the tokens of the bucket before it."""
        q, v = self._project(x, jnp.arange(x.shape[1])[None])
        buckets = self.hash(q, self._eval_rounds)
        out = self._attend(q, v, buckets, Mask(causal=True, keys=keys))
        buckets = rearrange(buckets, "r b t h -> b h r t")
        chunk = jnp.vectorize(ranks, signature="(t)->(t)")(buckets) // self.config.chunk
        here, length = keys[:, :, None, None], x.shape[1]
        buckets, chunk = (rearrange(part, "b h r t -> b t h r") for part in (buckets, chunk))
        state = ReformerState(
            *(
                cache.at[:, :length].set(jnp.where(here, part, empty).astype(cache.dtype))
                for cache, part, empty in zip(
                    state, (unit(q), v, buckets, chunk), (0, 0, -1, 0), strict=True
                )
            )
        )
        return out, state

    def refresh(self, step: jax.Array) -> None:
        """Redraw the rotations where `step` is a multiple of `redraw`.

        What is drawn depends on the key of construction and on step // redraw alone.
        """
        redraw(self.rotations, self._draw, step=step, every=self.config.redraw)

    @property
    def _eval_rounds(self) -> int:
        return self.config.eval_rounds or self.config.rounds

    def _draw(self, count):
        """[R, H, D, directions]: for every round, head and part its own.

        Never none, which could not be saved: of one bucket it is there but not used.
        """
        directions = max(1, sum(part // 2 for part in _parts(self.config, self.site)))
        rounds = max(self.config.rounds, self._eval_rounds)
        shape = (rounds, self.site.heads, self.site.head_dim, directions)
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key[...]), count)
        return jax.random.normal(key, shape)

    def _project(self, x, positions):
        q, v = (
            rearrange(part(x), "b t (h d) -> b t h d", h=self.site.heads)
            for part in (self.query, self.value)
        )
        return (rotate(q, positions) if self.site.positions == "rotary" else q), v

    def _attend(self, q, v, buckets, mask: Mask):
        out = lsh_attention(
            q, v, buckets,
            count=math.prod(_parts(self.config, self.site)), chunk=self.config.chunk,
            layout=self.config.layout, mask=mask, backend=self.site.backend,
        )  # fmt: skip
        return self._join(out)

    def _join(self, out):
        return self.out(rearrange(out, "b t h d -> b t (h d)"))


def _parts(config, site) -> tuple[int, ...]:
    """The numbers of buckets that are multiplied."""
    if config.buckets is not None:
        return config.buckets if isinstance(config.buckets, tuple) else (config.buckets,)
    count = 2 * math.ceil(site.seq / config.chunk / 2)
    if count <= 16:
        return (count,)
    first = 2 * math.ceil(math.sqrt(count) / 2)
    return first, 2 * math.ceil(count / first / 2)
