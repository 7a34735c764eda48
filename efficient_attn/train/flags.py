"""The command line: flags into a config, and a user's mistake into one sentence and exit code 2.

Nothing here imports jax, so `--help` answers at once.
"""

import dataclasses
import inspect
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from efficient_attn.errors import UserError, unknown
from efficient_attn.train import config as configs


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call `main` with the command line; a UserError becomes a sentence and exit code 2."""
    try:
        main(sys.argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Read `argv` into flags defined before.

    Raises:
        UserError: an unknown flag, a value of another type, a word that is not a flag.
    """
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise UserError(str(error).replace("\n", " ")) from None
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; flags look like --name=value")


def take_config(argv: Sequence[str]) -> tuple[ConfigDict | None, list[str]]:
    """The config that `--config=FILE[:ARGUMENT]` names, and the rest of the command line."""
    rest, spec = [], None
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            spec = value if equals else next(words, "")
        else:
            rest.append(word)
    return (None if spec is None else load_config(spec)), rest


def load_config(spec: str) -> ConfigDict:
    """What `get_config()` of a file returns; `FILE:ARGUMENT` passes it one string.

    Raises:
        UserError: there is no such file, it fails, or has no `get_config`.
    """
    path, colon, argument = spec.partition(":")
    if not Path(path).is_file():
        here = ", ".join(map(str, sorted(Path("configs").glob("*.py"))))
        raise UserError(
            f"there is no config file {path!r}" + (f"; here are: {here}" if here else "")
        )
    try:
        get_config = runpy.run_path(path)["get_config"]
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(f"{path} takes no argument; leave out ':{argument}'")
        found = get_config(*([argument] if colon else []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(found, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, not {found!r}")
    return found


def override(config: ConfigDict, values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define `--config.KEY=VALUE` for the keys that `argv` uses; parsing then changes `config`.

    A key below `config.model` may be new, since its options depend on the backbone.

    Raises:
        UserError: a key that the config does not have.
    """
    for word in argv:
        if word.startswith("--config."):
            key, _, value = word.removeprefix("--config.").partition("=")
            _check_key(config, key, value)
    try:
        config_flags.DEFINE_config_dict(
            "config",
            config,
            flag_values=values,
            lock_config=False,
            accept_new_attributes=True,
            sys_argv=list(argv),
        )
    except (flags.Error, ValueError, TypeError, KeyError) as error:
        raise UserError(str(error).replace("\n", " ")) from None


def _check_key(config: ConfigDict, key: str, value: str) -> None:
    node, names = config, key.split(".")
    for depth, name in enumerate(names):
        where = ".".join(["config", *names[:depth]])
        if where == "config.model":
            return
        if not isinstance(node, ConfigDict):
            raise UserError(f"{where} is a value and has no key {name!r}")
        if name not in node:
            raise unknown(f"key of {where}", name, node)
        node = node[name]
    if isinstance(node, ConfigDict) and not value.startswith("{"):
        raise UserError(f"--config.{key} is a section; set a key of it, --config.{key}.KEY=VALUE")


def usage(about: str, values: flags.FlagValues) -> str:
    """What a script is for, and its flags."""
    lines = [inspect.cleandoc(about), "", "flags:"]
    for name in sorted(values):
        lines.append(f"  --{name}: {values[name].help} (default: {values[name].default})")
    return "\n".join(lines)


def config_usage() -> str:
    """Every key of the config with its default, and what the sections mean."""
    default = configs.Experiment()
    keys = configs.flatten(dataclasses.asdict(default))
    lines = ["config keys, after --config=FILE, and their defaults before that file:"]
    lines += [f"  --config.{key}={value!r}" for key, value in keys.items()]
    lines.append("  --config.model.OPTION=...: of the backbone config.model.name, see --help-model")
    parts = {"config": default, "config.train": default.train}
    parts |= {"config.optimizer": default.optimizer, "config.data": default.data}
    parts |= {"config.distill": default.distill}
    sections = {f.name: getattr(default.data, f.name) for f in dataclasses.fields(default.data)}
    parts |= {
        f"config.data.{name}": section
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
    }
    for where, part in parts.items():
        lines += ["", f"{where}: {inspect.cleandoc(type(part).__doc__ or '')}"]
    return "\n".join(lines)
