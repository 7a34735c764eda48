r"""Train a model, or go on with a run that was stopped.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/digits.py --workdir=runs/linformer \
        --config.attention='linformer(rank=8)' --config.model.heads=2

Ctrl-C and SIGTERM save and stop; the same command goes on from there. What is compiled is kept in
~/.cache/efficient_attn/xla ($XDG_CACHE_HOME), unless JAX_ENABLE_COMPILATION_CACHE=false.
"""

from collections.abc import Sequence

from absl import flags

from efficient_attn.errors import UserError
from efficient_attn.train import config as configs
from efficient_attn.train.flags import config_usage, override, parse, run, take_config, usage


def define() -> flags.FlagValues:
    """The flags beside the config."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_bool(
        "replace", False, "move the run that is in --workdir aside and start anew",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("help", False, "print this", flag_values=values)
    for name, what in [("attention", "attention mechanisms"), ("model", "backbones")]:
        about = f"print the {what} and their options"
        flags.DEFINE_bool(f"help-{name}", False, about, flag_values=values)
    return values


def main(argv: Sequence[str]) -> None:
    """Parse, then train; jax is imported in between."""
    config, argv = take_config(argv)
    values = define()
    if config is not None:
        override(config, values, argv)
    elif any(word.startswith("--config.") for word in argv):
        raise UserError("--config.KEY=VALUE needs a config: add --config=configs/digits.py")
    parse(values, argv)
    given = values.flag_values_dict()
    if given["help"]:
        print(usage(__doc__ or "", define()), config_usage(), sep="\n\n")
    elif given["help-attention"]:
        from efficient_attn.train.tables import print_mechanisms

        print_mechanisms()
    elif given["help-model"]:
        from efficient_attn.train.tables import print_backbones

        print_backbones()
    elif config is None:
        raise UserError("say what to train, for example --config=configs/digits.py")
    elif not given["workdir"]:
        raise UserError("say where the run goes, for example --workdir=runs/digits")
    else:
        experiment = configs.resolve(config)
        from efficient_attn.train.compilation import prepare
        from efficient_attn.train.loop import train

        prepare()
        train(experiment, given["workdir"], replace=given["replace"])


if __name__ == "__main__":
    run(main)
