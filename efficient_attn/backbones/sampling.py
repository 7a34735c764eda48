"""The next token out of its logits: greedy, by temperature, of the top k, of the nucleus."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.config import require


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. By default as the model's probabilities have it.

    temperature: divides the logits; 0 takes the most likely token.
    top_k: of the k most likely tokens alone; None for all.
    top_p: of the nucleus alone; 1 for all. Taken after the temperature, of what top_k leaves.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        require(
            0 <= self.temperature < math.inf,
            f"temperature={self.temperature} must be finite and not negative",
        )
        require(self.top_k is None or self.top_k > 0, f"top_k={self.top_k} must be positive")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} is not in (0, 1]")
        require(
            self.temperature > 0 or self.top_k is None and self.top_p == 1,
            f"top_k={self.top_k} and top_p={self.top_p} are for drawing, but temperature=0 takes "
            "the most likely token; give a temperature",
        )


GREEDY = Sampling(temperature=0.0)


def choose(
    logits: Float[Array, "B V"], key: jax.Array | None, sampling: Sampling
) -> Int[Array, " B"]:
    """A token of each row, never 0; `key` is needed unless the temperature is 0."""
    logits = logits.astype(jnp.float32).at[:, 0].set(-jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert key is not None
    if sampling.top_k is None and sampling.top_p == 1:  # nothing to sort for
        return jax.random.categorical(key, logits / sampling.temperature).astype(jnp.int32)
    falling, order = narrow(logits, sampling)
    index = jax.random.categorical(key, falling)[:, None]
    return jnp.take_along_axis(order, index, axis=-1)[:, 0].astype(jnp.int32)


def narrow(
    logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
    """What is drawn from: the logits, the greatest first, -inf for what is left out; the tokens.

    Of what the temperature makes of them the top k stay, and of these the nucleus: the fewest most
    likely tokens with a probability of top_p or more (arXiv 1904.09751, equation 2). Of equals the
    lower ids stay; the most likely always does.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    falling = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
    if sampling.top_k is not None:
        kept = jnp.arange(logits.shape[-1])[None] < sampling.top_k
        falling = jnp.where(kept, falling, -jnp.inf)
    if sampling.top_p < 1:
        odds = jax.nn.softmax(falling)
        before = jnp.cumsum(odds, axis=-1) - odds
        falling = jnp.where(before < sampling.top_p, falling, -jnp.inf)
    return falling, order
