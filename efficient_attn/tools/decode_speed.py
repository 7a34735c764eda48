"""Generation against a key-value cache: tokens a second and bytes of state, mechanism by mechanism.

    python -m efficient_attn.tools.decode_speed softmax linear gated_delta

A fresh language model reads a prompt and writes as many tokens again, batch 1, float32, compiled
before the clock starts. The mechanisms take turns, and the best of the turns counts. Ratios of one
run mean something, seconds of a shared machine do not.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.progress import track

from efficient_attn import backbones
from efficient_attn.backbones import Input
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.tools.table import row
from efficient_attn.train.flags import run
from kernels.compiler import without_ynnpack

MODEL = {"depth": 4, "width": 256, "heads": 4}
VOCAB = 256


class Speed(NamedTuple):
    """Seconds from the prompt to its first token, and tokens a second after it; bytes that
    generation carries."""

    expression: str
    first_seconds: float
    tokens_per_second: float
    state_bytes: int


def measure(
    expressions: Sequence[str],
    *,
    prompt: int = 1000,
    tokens: int = 1000,
    turns: int = 3,
    options: Mapping[str, Any] = MODEL,
) -> list[Speed]:
    """`prompt` tokens read, `tokens` written, for each mechanism; `options` of the language model.

    Raises:
        UserError: a mechanism that does not decode.
    """
    length = prompt + tokens
    models = [_model(text, length, options) for text in expressions]
    text = jax.random.randint(jax.random.key(0), (1, prompt), 1, VOCAB)
    runs = {
        (text_of, count): _runner(model, text, count)
        for text_of, model in zip(expressions, models, strict=True)
        for count in (1, tokens)
    }
    best = dict.fromkeys(runs, float("inf"))
    for _ in track(range(turns), description="turns"):
        for which, timed in runs.items():
            best[which] = min(best[which], timed())
    return [
        Speed(
            expression,
            first_seconds=best[expression, 1],
            tokens_per_second=(tokens - 1) / (best[expression, tokens] - best[expression, 1]),
            state_bytes=_bytes(model),
        )
        for expression, model in zip(expressions, models, strict=True)
    ]


def _model(expression: str, length: int, options: Mapping[str, Any]) -> Any:
    source = Input(kind="text", shape=(length,), classes=VOCAB, vocab=VOCAB)
    return backbones.create(
        "causal_lm", options, attention=expression, source=source, rngs=make_rngs(0)
    )


def _runner(model, prompt, count: int):
    lengths = jnp.array([prompt.shape[1]])

    def timed() -> float:
        start = time.perf_counter()
        backbones.generate(model, prompt, lengths, max_tokens=count).block_until_ready()
        return time.perf_counter() - start

    timed()
    return timed


def _bytes(model) -> int:
    state = jax.eval_shape(lambda: model.init_state(1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def render(found: Sequence[Speed]) -> str:
    """The table in Markdown; speeds also as multiples of the first row's."""
    lines = [
        row(["mechanism", "tokens/s", "times the first", "first token, s", "state, bytes"]),
        row(["---"] + ["--:"] * 4),
    ]
    for s in found:
        ratio = s.tokens_per_second / found[0].tokens_per_second
        numbers = [f"{s.tokens_per_second:,.0f}", f"{ratio:.2f}", f"{s.first_seconds:.2f}"]
        lines.append(row([f"`{s.expression}`", *numbers, f"{s.state_bytes:,}"]))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure the expressions that are given, and print the table."""
    without_ynnpack()
    print(render(measure(argv[1:] or ["softmax", "linear", "gated_delta"])))


if __name__ == "__main__":
    run(main)
