"""BLEU of a translation model on text as it was read (Post 2018, arXiv 1804.08771)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from efficient_attn.backbones import EncoderDecoder
from efficient_attn.data import bpe
from efficient_attn.data.translation import Pairs
from efficient_attn.train.program import Program, State
from efficient_attn.train.sharding import of_kernels

BEAM, ALPHA = 4, 0.6  # of the length penalty: those of 1706.03762, section 6.1
SAMPLES = 5


def evaluate(
    program: Program,
    state: State,
    source: Pairs,
    *,
    batch_size: int,
    limit: int | None = None,
    path: Path,
) -> dict[str, Any]:
    """BLEU of the first `limit` pairs (all by default); their translations go to `path`, by lines.

    Returns "bleu" (0 to 100), "brevity" (the penalty for short translations), "signature" (how
    sacrebleu counted), "beam", "alpha", and "samples": "source", "translation" and "reference".
    """
    texts = [source.texts(i) for i in range(len(source))][:limit]
    model = program.evaluated(state)
    with of_kernels(program.mesh):
        found = translate(model, source, count=len(texts), batch_size=batch_size)
    path.write_text("".join(f"{' '.join(text.split())}\n" for text in found), encoding="utf-8")
    samples = [
        {"source": read, "translation": said, "reference": wanted}
        for (read, wanted), said in zip(texts[:SAMPLES], found, strict=False)
    ]
    scores = bleu(found, [wanted for _, wanted in texts])
    return scores | {"beam": BEAM, "alpha": ALPHA, "samples": samples}


def translate(model: EncoderDecoder, source: Pairs, *, count: int, batch_size: int) -> list[str]:
    """The likeliest translations of the first `count` sources, as text."""
    graph, state = nnx.split(model)

    @jax.jit
    def search(state, tokens):
        merged: EncoderDecoder = nnx.merge(graph, state)
        return merged.translate(tokens, start=bpe.START, end=bpe.END, beam=BEAM, alpha=ALPHA)

    texts: list[str] = []
    for start in range(0, count, batch_size):
        indices = np.minimum(np.arange(start, start + batch_size), count - 1)
        found = search(state, source.gather(indices)["inputs"]["source"])
        rows = np.asarray(found.tokens[:, 0])
        texts += [source.tokenizer.decode(row) for row in rows[: count - start]]
    return texts


def bleu(translations: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU, one reference each, by sacrebleu's own tokenizer ("13a", case kept)."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    score = metric.corpus_score(list(translations), [list(references)])
    signature = str(metric.get_signature())
    return {"bleu": score.score, "brevity": score.bp, "signature": signature}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the samples, then the score and how it was counted."""
    for sample in found["samples"]:
        text = "\n".join(f"{name}: {text}" for name, text in sample.items())
        console.print(text, markup=False, soft_wrap=True)
    score = f"BLEU {found['bleu']:.2f}, brevity penalty {found['brevity']:.3f}"
    counted = f"beam {found['beam']}, {found['signature']}"
    console.print(f"{score}, {counted}", markup=False, soft_wrap=True)
