"""Beam search over any model that decodes token by token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.config import require

Step = Callable[[Int[Array, " N"], Int[Array, " N"], Any], tuple[Float[Array, "N V"], Any]]
"""(tokens, their positions, state) -> (logits of the next token, state); N = B K rows, of which a
beam's K are neighbours. Every leaf of the state has N rows."""


class Found(NamedTuple):
    """Hypotheses, the best first.

    tokens: with their end, then zeros. scores: their penalised log-probability; -inf where there
    are fewer than K.
    """

    tokens: Int[Array, "B K L"]
    scores: Float[Array, "B K"]


class _Search(NamedTuple):
    """time: tokens written. alive: hypotheses without an end; total: their log-probability."""

    time: Int[Array, ""]
    state: Any
    alive: Int[Array, "B K L"]
    total: Float[Array, "B K"]
    found: Found
    count: Int[Array, " B"]


def beam_search(
    step: Step,
    state: Any,
    *,
    batch: int,
    beam: int,
    max_len: int,
    start: int,
    end: int,
    never: tuple[int, ...] = (0,),
    alpha: float = 0.6,
) -> Found:
    """The likeliest hypotheses Y of at most L = max_len tokens, each with its end, by

        score(Y) = log P(Y) / ((5 + |Y|) / 6)^alpha,

    the length penalty of Wu et al. 2016 (arXiv 1609.08144, equation 14, without its coverage
    penalty); |Y| counts the end. alpha = 0 is the plain log-probability.

    At each turn the 2 K best continuations of the K hypotheses are looked at. Those of the first K
    that end are finished and kept, the first K of the others go on; a row is done when it has K
    finished hypotheses (fairseq's rule), so that K = 1 is greedy decoding. The last of L tokens can
    only be the end: where K is no less than the number of all sequences, the search is exhaustive.

    state: before the first token, of B K rows. never: tokens that are not written, such as padding.

    Raises:
        UserError: beam, max_len or alpha out of range; an end that is never written.
    """
    for name, value in (("beam", beam), ("max_len", max_len)):
        require(value > 0, f"{name} must be positive, not {value}")
    require(alpha >= 0, f"alpha must not be negative, not {alpha}")
    require(
        end not in never, f"end={end} is among never={never}, so no text could end; leave it out"
    )
    empty = jnp.zeros((batch, beam, max_len), jnp.int32)
    first = jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf)
    begun = _Search(
        time=jnp.int32(0),
        state=state,
        alive=empty,
        total=jnp.broadcast_to(first, (batch, beam)),
        found=Found(empty, jnp.full((batch, beam), -jnp.inf)),
        count=jnp.zeros(batch, jnp.int32),
    )

    def more(search: _Search) -> Bool[Array, ""]:
        return (search.time < max_len) & jnp.any(search.count < beam)

    def turn(search: _Search) -> _Search:
        last = search.alive[:, :, jnp.maximum(search.time - 1, 0)].reshape(-1)
        last = jnp.where(search.time == 0, start, last)
        logits, state = step(last, jnp.broadcast_to(search.time, last.shape), search.state)
        chances = _chances(logits, last=search.time == max_len - 1, end=end, never=never)
        return _advance(search, state, rearrange(chances, "(b k) v -> b k v", k=beam), end, alpha)

    return jax.lax.while_loop(more, turn, begun).found


def spread(tree: Any, beam: int) -> Any:
    """Every row of every leaf `beam` times, one beside the other: [B, ...] -> [B K, ...]."""
    return jax.tree.map(lambda x: repeat(x, "b ... -> (b k) ...", k=beam), tree)


def _chances(logits, *, last, end: int, never: tuple[int, ...]) -> Float[Array, "N V"]:
    """Log-probabilities, -inf for what must not be written."""
    chances = jax.nn.log_softmax(logits.astype(jnp.float32))
    token = jnp.arange(logits.shape[-1])
    banned = jnp.isin(token, jnp.asarray(never, jnp.int32)) | (last & (token != end))
    return jnp.where(banned[None], -jnp.inf, chances)


def _advance(search: _Search, state: Any, chances: Float[Array, "B K V"], end: int, alpha: float):
    beam, vocab = chances.shape[1:]
    every = rearrange(search.total[..., None] + chances, "b k v -> b (k v)")
    totals, index = jax.lax.top_k(every, min(2 * beam, every.shape[1]))
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    texts = jnp.take_along_axis(search.alive, parent[..., None], axis=1)
    texts = texts.at[:, :, search.time].set(token)

    good = (jnp.arange(totals.shape[1]) < beam)[None] & (search.count < beam)[:, None]
    ended = (token == end) & good & jnp.isfinite(totals)
    penalty = ((5.0 + search.time + 1.0) / 6.0) ** alpha
    scores = jnp.where(ended, totals / penalty, -jnp.inf)
    found = _best(
        jnp.concatenate([search.found.tokens, texts], axis=1),
        jnp.concatenate([search.found.scores, scores], axis=1),
        beam,
    )

    total, kept = jax.lax.top_k(jnp.where(token == end, -jnp.inf, totals), beam)
    parent = jnp.take_along_axis(parent, kept, axis=1)
    rows = (jnp.arange(len(parent))[:, None] * beam + parent).reshape(-1)
    return _Search(
        time=search.time + 1,
        state=jax.tree.map(lambda x: x[rows], state),
        alive=jnp.take_along_axis(texts, kept[..., None], axis=1),
        total=total,
        found=found,
        count=search.count + ended.sum(axis=1, dtype=jnp.int32),
    )


def _best(tokens: Int[Array, "B N L"], scores: Float[Array, "B N"], beam: int) -> Found:
    scores, kept = jax.lax.top_k(scores, beam)
    tokens = jnp.take_along_axis(tokens, kept[..., None], axis=1)
    return Found(jnp.where(jnp.isfinite(scores)[..., None], tokens, 0), scores)
