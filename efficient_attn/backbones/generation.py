"""Text out of a language model: prompts read at once, then token by token, in one loop."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Int

from efficient_attn.backbones.causal_lm import CausalLM
from efficient_attn.backbones.sampling import GREEDY, Sampling, choose
from efficient_attn.config import require
from efficient_attn.layers.rngs import make_rngs


def generate(
    model: CausalLM,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    stop: int | None = None,
) -> Int[Array, "B N"]:
    """N = `max_tokens` tokens after each prompt, 0 behind a row's `stop` token.

    A text may be longer than the model was built for where one built for it would go on in the
    same way: no positions are added, and no cache, window or horizon is cut to the length.

    The loop holds the mechanisms' states alone, whose size does not change: a few sums for a
    recurrence, a cache of the model's longest sequence (or of a window) for others. It ends early
    when every row has come to `stop`.

    prompts: padded on the right, `lengths` >= 1 tokens each, none of them 0.
    key: for sampling; greedy, the default, does without.

    Raises:
        UserError: a mechanism that does not decode, a text longer than the model can have, no
            key to sample with, a vocabulary without `stop`, prompts or lengths that are not as
            above (of those under `jit` the shapes alone are known).
    """
    vocab, total = model.embed.embedding.shape[0], prompts.shape[1] + max_tokens
    check_prompts(prompts, lengths, vocab)
    require(max_tokens > 0, f"max_tokens={max_tokens} must be positive")
    require(
        total <= model.length or _step(model, model.length) == _step(model, total),
        f"a prompt of {prompts.shape[1]} tokens and max_tokens={max_tokens} make more than the "
        f"{model.length} that the model was built for; shorten one of them",
    )
    require(
        key is not None or sampling.temperature == 0,
        f"temperature={sampling.temperature} draws tokens and needs a key; 0 needs none",
    )
    require(
        stop is None or 0 < stop < vocab, f"stop={stop} is not a token id from 1 to {vocab - 1}"
    )
    graph, state = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    return _generate(graph, max_tokens, sampling, stop, state, prompts, lengths, key)


def _step(model: CausalLM, length: int) -> str:
    """The program of one step, had the model been built for `length` tokens."""
    source = replace(model.source, shape=(length,))
    made = nnx.eval_shape(lambda: CausalLM(model.config, source, model.build, rngs=make_rngs(0)))
    graph, weights = nnx.split(made)

    def step(weights, tokens, state):
        return nnx.merge(graph, weights).step(tokens, state, position=tokens)

    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
    state = jax.eval_shape(lambda: made.init_state(1))
    return jax.jit(step).lower(weights, tokens, state).as_text()


def check_prompts(prompts, lengths, vocab: int) -> None:
    """Raise UserError for what is not ids, padded on the right, or not their numbers."""
    require(
        prompts.ndim == 2 and lengths.shape == prompts.shape[:1],
        f"prompts of shape {prompts.shape} and lengths of {lengths.shape}; give (B, T) and (B,)",
    )
    if isinstance(prompts, Tracer) or isinstance(lengths, Tracer):
        return
    rows = zip(np.asarray(prompts).tolist(), np.asarray(lengths).tolist(), strict=True)
    for row, (ids, count) in enumerate(rows):
        require(
            1 <= count <= len(ids),
            f"lengths[{row}]={count} is not from 1 to {len(ids)}; count the tokens of row {row}, "
            "padded on the right",
        )
        wrong = [token for token in ids[:count] if not 0 < token < vocab]
        require(
            not wrong,
            f"row {row} has {wrong[:1]} among its first {count} tokens, which are ids from 1 to "
            f"{vocab - 1}; pad on the right",
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(graph, max_tokens, sampling, stop, weights, prompts, lengths, key):
    model: CausalLM = nnx.merge(graph, weights)
    batch = len(prompts)

    def pick(count, logits, done, text):
        token = choose(logits, jax.random.fold_in(key, count), sampling)
        text = text.at[:, count].set(jnp.where(done, 0, token))
        return token, done if stop is None else done | (token == stop), text

    def going(carry):
        count, _, _, done, _ = carry
        return (count < max_tokens) & ~jnp.all(done)

    def one(carry):
        count, token, state, done, text = carry
        logits, state = model.step(token, state, position=lengths + count - 1)
        token, done, text = pick(count, logits, done, text)
        return count + 1, token, state, done, text

    logits, state = model.prefill(prompts, lengths, model.init_state(batch))
    text = jnp.zeros((batch, max_tokens), jnp.int32)
    token, done, text = pick(0, logits, jnp.zeros(batch, bool), text)
    start = (jnp.int32(1), token, state, done, text)
    return jax.lax.while_loop(going, one, start)[-1]
