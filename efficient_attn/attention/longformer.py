"""Longformer: a sliding window, dilated in some heads, and tokens that see and are seen by all."""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from efficient_attn.attention.base import Core, Cost, refuse_context, refuse_mask
from efficient_attn.attention.local import newest, reach, shifted
from efficient_attn.attention.multihead import MultiHead
from efficient_attn.attention.softmax import KeyValueCache
from efficient_attn.config import at_least, require
from efficient_attn.layers.positions import rotate
from kernels import Blocks, Mask, block_attention, join, softmax_attention, window_attention
from kernels.block_attention import runs
from kernels.window_attention import window_blocks


class Longformer(MultiHead):
    """Windows of W tokens, and global tokens (Beltagy et al., arXiv 2004.05150, section 3).

    Linear in the length. The first `tokens` tokens are global: every token sees them, with the keys
    and values of its window and in one softmax, and they see every token, by projections of their
    own. As in the released code, a window is W // 2 tokens on each side; in the causal form, the
    paper's language model, it is the last W tokens, and a global token sees those before it.
    """

    @dataclass(frozen=True)
    class Config:
        """window: W; of a tuple, layer i takes entry i and deeper layers the last one (the paper's
        language models grow it from 32 to 512).
        dilation: d, the distance of neighbours within a window, by layer as `window` is; 1 is none.
        dilated: heads with that dilation, the last ones; the others have none. None is all heads.
        tokens: global tokens, at the beginning.
        projections: "separate" gives global tokens' attention queries, keys and values of its own,
        which begin as copies of the windows' (section 3.1), "shared" those of the windows (the
        paper's ablation, table 10).
        """

        window: int | tuple[int, ...] = 512
        dilation: int | tuple[int, ...] = 1
        dilated: int | None = 2
        tokens: int = 1
        projections: Literal["separate", "shared"] = "separate"

        def __post_init__(self):
            for name in ("window", "dilation"):
                value = getattr(self, name)
                each = value if isinstance(value, tuple) else (value,)
                require(
                    len(each) > 0 and min(each) > 0,
                    f"{name}={value} must be positive, one number or one for each layer",
                )
            at_least(self, 0, "tokens")
            require(
                self.dilated is None or self.dilated >= 0,
                f"dilated={self.dilated} must not be negative",
            )

    paper = "Longformer: The Long-Document Transformer, arXiv 2004.05150"
    supports = frozenset({"padding", "causal", "bidirectional", "segments", "decode", "alibi"})
    remedy = "tokens=0"

    core: "Sliding"

    def __init__(self, config, site, *, rngs, shared):
        require(
            config.dilation == 1 or (config.dilated or 0) <= site.heads,
            f"longformer: dilated={config.dilated} exceeds heads={site.heads}; lower it",
        )
        core = Sliding(config, site, rngs=rngs, shared=shared)
        super().__init__(core, capabilities=self.capabilities(config), rngs=rngs)
        self.config = config
        if config.tokens and config.projections == "separate":
            self.global_query, self.global_key, self.global_value = (
                _copy(each) for each in (self.query, self.key, self.value)
            )

    @classmethod
    def capabilities(cls, config):
        """Global tokens begin the sequence, not each segment, and would not fit a cache of W."""
        return cls.supports - ({"segments", "decode"} if config.tokens else set())

    @classmethod
    def cost(cls, config, site, length):
        """2 D for each pair compared in a head, in both directions, and the projections."""
        pairs = sum(
            blocks.logits * (last - first)
            for first, last, window, dilation in _groups(config, site.heads, site.layer)
            for blocks in (
                _window(length, window, dilation),
                *_globals(length, config.tokens),
            )
        )
        tokens = min(config.tokens, length)
        work = 2 * pairs * site.head_dim + 4 * length * site.width**2
        work += 2 * tokens * length * site.width
        if tokens and config.projections == "separate":
            work += (tokens + 2 * length) * site.width**2
        kept = 4 * 2 * _held(config, site) * site.width
        return Cost(work, None if config.tokens else kept)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused."""
        refuse_context("longformer", context)
        refuse_mask("longformer", mask, self.allowed)
        q, k, v = self.project(x, positions)
        out = self.core(q, k, v, mask=mask, shared=shared)
        tokens = min(self.config.tokens, x.shape[1])
        if tokens:
            rows = self._rows(x, (q, k, v), tokens, positions, mask)
            out = jnp.concatenate([rows, out[:, tokens:]], axis=1)
        return self.out(rearrange(out, "b t h d -> b t (h d)"))

    def _rows(self, x, heads, tokens: int, positions, mask: Mask):
        """What the global tokens see: everything, or what is before them."""
        q, k, v = heads[0][:, :tokens], *heads[1:]
        site = self.core.site
        seen = slice(tokens) if mask.causal else slice(None)
        if self.config.projections == "separate":
            split = lambda y: rearrange(y, "b t (h d) -> b t h d", h=site.heads)  # noqa: E731
            q = split(self.global_query(x[:, :tokens]))
            k, v = split(self.global_key(x)), split(self.global_value(x))
            if site.positions == "rotary":
                at = jnp.arange(x.shape[1])[None] if positions is None else positions
                q, k = rotate(q, at[:, :tokens]), rotate(k, at)
        keys = None if mask.keys is None else mask.keys[:, seen]
        return softmax_attention(
            q, k[:, seen], v[:, seen], mask=Mask(causal=mask.causal, keys=keys),
            slopes=self.core.slopes(), backend=site.backend,
        )  # fmt: skip


class Sliding(Core):
    """The windows, with global tokens among the keys; see `Longformer`."""

    paper = Longformer.paper

    def __call__(self, q, k, v, *, mask, shared):
        """See `kernels.window_attention`."""
        tokens, outs = self.config.tokens, []
        near = mask
        if tokens:
            others = jnp.arange(k.shape[1])[None] >= tokens
            keys = jnp.ones(k.shape[:2], bool) if mask.keys is None else mask.keys
            near = replace(mask, keys=keys & others)
        for first, last, window, dilation in self._groups:
            heads = slice(first, last)
            given = q[:, :, heads], k[:, :, heads], v[:, :, heads]
            slopes = self.slopes(heads)
            left, right = reach(window, causal=mask.causal)
            parts = [
                window_attention(
                    *given, left=left, right=right, dilation=dilation, mask=near,
                    slopes=slopes, backend=self.site.backend,
                )
            ]  # fmt: skip
            for blocks in _globals(k.shape[1], tokens):  # few: XLA's, whatever the backend
                parts.append(block_attention(*given, blocks=blocks, mask=mask, slopes=slopes))
            outs.append(join(*parts))
        return jnp.concatenate(outs, axis=2).astype(q.dtype)

    def init_state(self, batch, dtype):
        """The tokens that the widest window reaches, the newest last; none yet."""
        if self.config.tokens:
            return super().init_state(batch, dtype)
        shape = (batch, _held(self.config, self.site), self.site.heads, self.site.head_dim)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def step(self, q, k, v, state, *, position):
        """Drop the oldest token, add this one, attend to those of each head's window."""
        state = shifted(state, k, v)
        kept, outs = state.keys.shape[1], []
        age = kept - 1 - jnp.arange(kept)[None]
        for first, last, window, dilation in self._groups:
            heads = slice(first, last)
            near = (age < window * dilation) & (age % dilation == 0)
            outs.append(
                softmax_attention(
                    q[:, :, heads], state.keys[:, :, heads], state.values[:, :, heads],
                    mask=Mask(keys=near & (age <= position[:, None])), slopes=self.slopes(heads),
                    positions=jnp.full((1, 1), kept - 1), backend="xla",
                )
            )  # fmt: skip
        return jnp.concatenate(outs, axis=2), state

    def prefill(self, q, k, v, state, *, keys):
        """All tokens at once; the last ones of each row stay."""
        out = self(q, k, v, mask=Mask(causal=True, keys=keys), shared={})
        return out, newest(state, k, v, keys=keys)

    @property
    def _groups(self):
        return _groups(self.config, self.site.heads, self.site.layer)


def _copy(module: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def _groups(config: Longformer.Config, heads: int, layer: int) -> list[tuple[int, int, int, int]]:
    """(first head, last + 1, window, dilation): the heads without dilation, and those with."""
    window, dilation = (
        value[min(layer, len(value) - 1)] if isinstance(value, tuple) else value
        for value in (config.window, config.dilation)
    )
    plain = 0 if config.dilated is None else heads - config.dilated
    plain = heads if dilation == 1 else plain
    groups = [(0, plain, window, 1), (plain, heads, window, dilation)]
    return [group for group in groups if group[0] < group[1]]


def _window(length: int, window: int, dilation: int) -> Blocks:
    left, right = reach(window, causal=False)
    return window_blocks(length, left=left, right=right, dilation=dilation)


def _globals(length: int, tokens: int) -> tuple[Blocks, ...]:
    """The global tokens as one block of keys, for all queries."""
    if not tokens:
        return ()
    at = runs(length, min(length, 128))
    keys = np.arange(min(tokens, length))[None]
    return (Blocks(queries=at, keys=keys, table=np.zeros((1, len(at), 1), np.int32)),)


def _held(config: Longformer.Config, site) -> int:
    """Tokens of the cache: those between a token and the farthest it sees."""
    farthest = max((w - 1) * d for _, _, w, d in _groups(config, site.heads, site.layer))
    return min(farthest + 1, site.seq)
