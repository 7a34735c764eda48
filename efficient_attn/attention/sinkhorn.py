"""Sparse Sinkhorn attention: each block attends to itself and to a block sorted to its place."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from efficient_attn.attention.base import Cost, Mixer, Site, refuse_context, refuse_mask
from efficient_attn.attention.multihead import linear
from efficient_attn.config import at_least, require
from efficient_attn.layers.positions import rotate
from kernels.dispatch import Path, run
from kernels.masked_softmax import masked_softmax

LEAST = 1e-6
"""A share of a mixture below this counts as nothing: its gradient would be of 1 / share^2."""


class Sinkhorn(Mixer):
    """softmax(q [S k, k]^T / sqrt(D)) [S v, v], block by block (Tay et al. 2020, 2002.11296).

    S = Sinkhorn((P(x') + g) / temperature), one for each head, is nearly a permutation of the
    blocks: row i says which blocks are mixed, place by place, into the one that stands beside block
    i. x' are sums of the tokens of each block, P a sorting network, g Gumbel noise in training.
    Padding is in no sum; blocks without a token are neither rows nor columns of S, and a place that
    holds tokens in only a share p of its mixture counts p times. Not causal: the sums of S's
    columns run over later blocks, and a doubly stochastic matrix without entries above its diagonal
    is the identity, so the paper's causal balancing has no strict form. The paper's mixture with
    full attention is left out.
    """

    @dataclass(frozen=True)
    class Config:
        """block: tokens of a block; a longer sequence is filled up to whole blocks.
        iterations: of normalising rows, then columns.
        temperature: below 1 sharpens S.
        noise: added to P(x') in training, "gumbel" or "none".
        network: "mlp" is relu(W_B relu(W_P x' + b_P) + b_B), "linear" W_B x' + b_B.
        sortcut: n, let all queries attend to the first n sorted blocks and to nothing else (the
        paper's SortCut), or None.
        """

        block: int = 64
        iterations: int = 7
        temperature: float = 0.75
        noise: Literal["gumbel", "none"] = "gumbel"
        network: Literal["mlp", "linear"] = "mlp"
        sortcut: int | None = None

        def __post_init__(self):
            at_least(self, 1, "block", "iterations")
            require(self.temperature > 0, f"temperature={self.temperature} must be positive")
            require(
                self.sortcut is None or self.sortcut > 0,
                f"sortcut={self.sortcut} must be positive, or None to attend block by block",
            )

    paper = "Sparse Sinkhorn Attention, arXiv 2002.11296"
    supports = frozenset({"padding", "bidirectional"})

    def __init__(self, config, site, *, rngs, shared):
        require(
            site.positions != "rotary" or site.head_dim % 2 == 0,
            f"rotary positions need an even head width, not {site.head_dim}; change heads or width",
        )
        self.config, self.site = config, site
        self.query, self.key, self.value, self.out = (
            linear(site.width, site, rngs=rngs) for _ in range(4)
        )
        self.sort = SortingNetwork(config, site, rngs=rngs)

    @classmethod
    def cost(cls, config, site, length):
        """Projections, sorting, moving (each of N x N blocks, or n x N) and attending."""
        block, width = min(config.block, length), site.width
        number = -(-length // block)
        taken = number if config.sortcut is None else min(config.sortcut, number)
        sort = number**2 * width * site.heads
        sort += number * width**2 if config.network == "mlp" else 0
        move = taken * number * block * (2 * width + site.heads)
        visible = 2 * block if config.sortcut is None else taken * block
        queries = number * block if config.sortcut is None else length
        attend = 2 * queries * visible * width
        return Cost(4 * length * width**2 + sort + move + attend, None)

    def __call__(self, x, context=None, *, mask, positions=None, rngs=None, shared):
        """Self-attention only; a context is refused, and more tokens than the site's longest."""
        refuse_context("sinkhorn", context)
        refuse_mask("sinkhorn", mask, self.supports)
        if x.shape[1] > self.site.seq:
            raise ValueError(f"{x.shape[1]} tokens, but sinkhorn was built for {self.site.seq}")
        mask.check(x.shape[1], x.shape[1])
        at = jnp.arange(x.shape[1])[None] if positions is None else positions
        q, k, v = (
            rearrange(part(x), "b t (h d) -> b t h d", h=self.site.heads)
            for part in (self.query, self.key, self.value)
        )
        if self.site.positions == "rotary":
            q, k = rotate(q, at), rotate(k, at)
        valid = jnp.ones(x.shape[:2], bool) if mask.keys is None else mask.keys
        order = self.order(x, valid, rngs)
        paths = {"xla": Path(self._xla)}
        out = run("sinkhorn", self.site.backend, paths, (q, k, v, valid, order), {})
        return self.out(rearrange(out, "b t h d -> b t (h d)"))

    def order(
        self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"], rngs: nnx.Rngs | None
    ) -> Float[Array, "B H N N"]:
        """S of every head; rows and columns of blocks without a token are 0."""
        tokens = jnp.where(valid[..., None], x, 0).astype(jnp.float32)
        scores = self.sort(jnp.sum(blocks(tokens, self.config.block), axis=2))
        if self.config.noise == "gumbel" and rngs is not None:
            scores = scores + jax.random.gumbel(rngs.dropout(), scores.shape)
        live = jnp.any(blocks(valid, self.config.block), axis=2)[:, None]
        return sinkhorn(scores / self.config.temperature, live, self.config.iterations)

    def _xla(self, q, k, v, valid, order):
        block, length, scale = self.config.block, q.shape[1], self.site.head_dim**-0.5
        there, live = blocks(valid, block), None
        keys, values = (blocks(jnp.where(valid[..., None, None], x, 0), block) for x in (k, v))
        if self.config.sortcut is not None:
            live = jnp.argsort(~jnp.any(there, axis=2), axis=1, stable=True)
            order = jnp.take_along_axis(order, live[:, None, : self.config.sortcut, None], axis=2)
        moved_keys, moved_values, share = moved(keys, values, there, order)
        if live is not None:
            flat = lambda x: rearrange(x, "b n c ... -> b 1 (n c) ...")  # noqa: E731
            q, keys, values, share = q[:, None], *map(flat, (moved_keys, moved_values, share))
            seen = share > 0
        else:
            q = blocks(q, block)
            keys = jnp.concatenate([moved_keys, keys.astype(jnp.float32)], axis=2)
            values = jnp.concatenate([moved_values, values.astype(jnp.float32)], axis=2)
            own = jnp.broadcast_to(there[..., None], share.shape)
            seen = jnp.concatenate([share > 0, own], axis=2)
            share = jnp.concatenate([share, own.astype(share.dtype)], axis=2)
        logits = jnp.einsum("bnchd,bnkhd->bnhck", q.astype(jnp.float32), keys) * scale
        counts = jnp.log(jnp.where(seen, share, 1))
        across = lambda x: rearrange(x, "b n k h -> b n h 1 k")  # noqa: E731
        weights = masked_softmax(logits + across(counts), across(seen))
        out = jnp.einsum("bnhck,bnkhd->bnchd", weights, values).astype(v.dtype)
        return rearrange(out, "b n c h d -> b (n c) h d")[:, :length]


class SortingNetwork(nnx.Module):
    """P: of each block's sum [E], for every head, a score of each block that may come to it."""

    def __init__(self, config: Sinkhorn.Config, site: Site, *, rngs: nnx.Rngs):
        self.deep = config.network == "mlp"
        if self.deep:
            self.first = nnx.Linear(site.width, site.width, rngs=rngs)
        shape = (site.width, site.heads, -(-site.seq // config.block))
        self.second = nnx.Param(jax.random.normal(rngs.params(), shape) * site.width**-0.5)
        self.bias = nnx.Param(jnp.zeros(shape[1:]))

    def __call__(self, sums: Float[Array, "B N E"]) -> Float[Array, "B H N N"]:
        """The first N columns: as many as there are blocks."""
        number = sums.shape[1]
        sums = nnx.relu(self.first(sums)) if self.deep else sums
        scores = jnp.einsum("bne,ehm->bhnm", sums, self.second[...][:, :, :number])
        scores = scores + self.bias[...][None, :, None, :number]
        return nnx.relu(scores) if self.deep else scores


def sinkhorn(
    scores: Float[Array, "B H N N"], live: Bool[Array, "B #H N"], iterations: int
) -> Float[Array, "B H N N"]:
    """exp(scores), rows and then columns divided by their sums, `iterations` times, in logarithms.

    Tends to a doubly stochastic matrix (Sinkhorn 1964). Only rows and
    columns that are `live` take part; others are 0.
    """
    pair = live[..., :, None] & live[..., None, :]

    def normalised(logs, axis):
        top = jnp.max(jnp.where(pair, logs, -jnp.inf), axis=axis, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        total = jnp.sum(jnp.where(pair, jnp.exp(logs - top), 0), axis=axis, keepdims=True)
        return jnp.where(pair, logs - top - jnp.log(jnp.where(total > 0, total, 1)), 0)

    def step(_, logs):
        return normalised(normalised(logs, -1), -2)

    logs = jax.lax.fori_loop(0, iterations, step, jnp.where(pair, scores, 0))
    return jnp.where(pair, jnp.exp(logs), 0)


def blocks(x: Array, block: int) -> Array:
    """[B,T,...] -> [B,N,C,...], filled up with zeros or False; C is `block` or, if less, T."""
    block = min(block, x.shape[1])
    pad = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    return rearrange(jnp.pad(x, pad), "b (n c) ... -> b n c ...", c=block)


def moved(
    keys: Float[Array, "B N C H D"],
    values: Float[Array, "B N C H D"],
    there: Bool[Array, "B N C"],
    order: Float[Array, "B H M N"],
) -> tuple[Float[Array, "B M C H D"], Float[Array, "B M C H D"], Float[Array, "B M C H"]]:
    """S k, S v, and the share of S that falls on tokens, at every place of every sorted block.

    Where that share p is not 1, keys and values are those of the tokens alone: divided by p. A
    share below `LEAST` is 0. Padded keys and values are 0 already.
    """
    mass = jnp.einsum("bhmn,bnc->bmch", order, there.astype(order.dtype))
    whole = rearrange(jnp.sum(order, axis=-1), "b h m -> b m 1 h")
    share = mass / jnp.where(whole > 0, whole, 1)
    share = jnp.where(share > LEAST, share, 0)
    divisor = jnp.where(share > 0, share, 1)[..., None]
    keys, values = (
        jnp.einsum("bhmn,bnchd->bmchd", order, x.astype(order.dtype)) / divisor
        for x in (keys, values)
    )
    return keys, values, share
