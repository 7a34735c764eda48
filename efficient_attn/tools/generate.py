"""Let a language model that train.py made continue a text.

    python -m efficient_attn.tools.generate --workdir=runs/text --prompt="Once upon a time"
    python -m efficient_attn.tools.generate --workdir=runs/text --temperature=0.8 --top_p=0.95

Greedy unless a temperature is given. Prints the prompt and what follows it, up to the end of the
document.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from efficient_attn import backbones, data
from efficient_attn.backbones import Sampling
from efficient_attn.data.tokenizers import Tokenizer
from efficient_attn.errors import UserError
from efficient_attn.evals.run import restore
from efficient_attn.train.compilation import prepare
from efficient_attn.train.config import resolve
from efficient_attn.train.flags import parse, run, usage
from efficient_attn.train.program import build
from efficient_attn.train.sharding import of_kernels
from efficient_attn.train.task import score
from efficient_attn.train.workdir import Workdir, read_json


def continue_text(
    path: str | Path,
    prompt: str,
    *,
    max_tokens: int | None = None,
    sampling: Sampling,
    seed: int = 0,
    step: str = "last",
) -> str:
    """What the run at `path` writes after `prompt`, the beginning of a document.

    max_tokens: by default 100, or what a shorter length of the model leaves.
    step: a number, "last", or "best" by validation.

    Raises:
        UserError: no such run or checkpoint; not a language model of text; a mechanism that does
            not decode; more tokens than the model can have.
    """
    workdir = Workdir(path)
    if not workdir.config.exists():
        raise UserError(f"{workdir.path} holds no run: it has no config.json")
    experiment = resolve(read_json(workdir.config))
    name = experiment.model["name"]
    if name != "causal_lm":
        raise UserError(f"the model of this run is {name!r}; only 'causal_lm' continues a text")
    dataset = data.load(experiment.data)
    info = dataset.info
    if info.tokenizer is None:
        raise UserError(f"data.name={experiment.data.name!r} has no tokenizer to write text with")
    program = build(experiment, dataset)
    _, state = restore(workdir, program, step, score(info))
    model = program.evaluated(state)
    ids = np.zeros(0, np.int32)
    if prompt:
        ids = info.tokenizer.encode(prompt, max_len=sys.maxsize)
    start = [] if info.end is None else [info.end]
    tokens = np.concatenate([np.array(start, np.int32), ids])
    if not len(tokens):
        raise UserError("give a prompt: this data set has no token to begin a document with")
    if max_tokens is None:
        room = info.shape[0] - len(tokens)
        max_tokens = min(100, room) if room > 0 else 100
    with of_kernels(program.mesh):
        found = backbones.generate(
            model, jnp.asarray(tokens)[None], jnp.array([len(tokens)]), max_tokens=max_tokens,
            sampling=sampling, key=jax.random.key(seed), stop=info.end,
        )  # fmt: skip
    written = np.asarray(found[0])
    written = written[(written > 0) & (written != info.end)]
    return append(info.tokenizer, prompt, ids, written)


def append(tokenizer: Tokenizer, prompt: str, ids: np.ndarray, written: np.ndarray) -> str:
    """The prompt and, after whatever the tokenizer puts between its `ids` and them, new tokens."""
    whole = tokenizer.decode(np.concatenate([ids, written]))
    return prompt + whole[len(tokenizer.decode(ids)) :]


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    text = [
        ("workdir", None, "directory of the run"),
        ("prompt", "", "how the text begins"),
        ("step", "last", "a step that was saved, last, or best (by validation)"),
    ]
    for name, default, about in text:
        flags.DEFINE_string(name, default, about, flag_values=values)
    about = "tokens to write at most; by default 100, or what fits"
    flags.DEFINE_integer("max_tokens", None, about, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=values)
    flags.DEFINE_integer("top_k", None, "draw from the k most likely alone", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw from the nucleus of this mass", flag_values=values)
    flags.DEFINE_bool("help", False, "print this", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Parse, restore, print."""
    values = define()
    parse(values, argv)
    given = values.flag_values_dict()
    if given["help"]:
        print(usage(__doc__ or "", define()))
        return
    if not given["workdir"]:
        raise UserError("say which run, for example --workdir=runs/text")
    prepare()
    sampling = Sampling(given["temperature"], given["top_k"], given["top_p"])
    text = continue_text(
        given["workdir"], given["prompt"], max_tokens=given["max_tokens"], sampling=sampling,
        seed=given["seed"], step=given["step"],
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    run(main)
