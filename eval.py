"""Evaluate a run that train.py made, on any split, from any of its checkpoints.

    python eval.py --workdir=runs/digits
    python eval.py --workdir=runs/digits --split=validation --step=best --export_predictions=p.csv
    python eval.py --workdir=runs/dup --attention='reformer(rounds=1, chunk=16, eval_rounds=8)'

Writes DIR/eval/SPLIT-STEP.json and .png: the confusion matrix of a classifier, the loss by position
in the context of a model of tokens.
"""

from collections.abc import Sequence

from absl import flags

from efficient_attn.errors import UserError
from efficient_attn.train.flags import parse, run, usage


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    text = [
        ("workdir", None, "directory of the run"),
        ("split", "test", "train, validation or test"),
        ("step", "last", "a step that was saved, last, or best (by validation)"),
        ("attention", None, "another attention with the same parameters, to evaluate them under"),
        ("export_predictions", None, "a CSV file for index, label, prediction, probability"),
    ]
    for name, default, about in text:
        flags.DEFINE_string(name, default, about, flag_values=values)
    numbers = [
        ("limit", "evaluate the first so many examples only"),
        ("batch_size", "examples in a batch; by default the run's own, for the same numbers"),
    ]
    for name, about in numbers:
        flags.DEFINE_integer(name, None, about, lower_bound=1, flag_values=values)
    flags.DEFINE_bool("help", False, "print this", flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Parse, then evaluate; jax is imported in between."""
    values = define()
    parse(values, argv)
    given = values.flag_values_dict()
    if given["help"]:
        print(usage(__doc__ or "", define()))
        return
    if not given["workdir"]:
        raise UserError("say which run, for example --workdir=runs/digits")

    from rich.console import Console

    from efficient_attn.evals.run import evaluate_run, show
    from efficient_attn.train.compilation import prepare

    prepare()
    found = evaluate_run(
        given["workdir"],
        split=given["split"],
        step=given["step"],
        attention=given["attention"],
        limit=given["limit"],
        batch_size=given["batch_size"],
        export=given["export_predictions"],
    )
    show(found, Console())


if __name__ == "__main__":
    run(main)
