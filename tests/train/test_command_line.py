"""train.py and eval.py as a user meets them: help, and mistakes made before jax is imported."""

import resource
import subprocess
import sys

import pytest

from efficient_attn.train import config as configs
from tests.conftest import ROOT


def script(name, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


DIGITS = "--config=configs/digits.py"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say what to train, for example --config=configs/digits.py"),
        ([DIGITS], "say where the run goes, for example --workdir=runs/digits"),
        ([DIGITS, "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
        ([DIGITS, "--workdir=x", "stray"], "'stray' is not a flag"),
        (["--config=configs/digit.py"], "no config file 'configs/digit.py'; here are: configs/"),
        (["--config.train.steps=3"], "--config.KEY=VALUE needs a config"),
        ([DIGITS, "--config.train.stepz=3"], "key of config.train 'stepz'; did you mean 'steps'"),
        ([DIGITS, "--config.trian.steps=3"], "key of config 'trian'; did you mean 'train'"),
        ([DIGITS, "--config.seed.steps=3"], "config.seed is a value and has no key 'steps'"),
        ([DIGITS, "--config.train.steps=many"], "--config.train.steps=many"),
        ([DIGITS, "--config.train.steps=1.5"], "--config.train.steps=1.5"),
        ([DIGITS, "--workdir=x", "--config.train.dtype=float16"], "one of 'float32', 'bfloat16'"),
        ([DIGITS, "--workdir=x", "--config.train.steps=0"], "steps must be at least 1, not 0"),
        ([DIGITS, "--config.train=3"], "--config.train is a section; set a key of it"),
        ([DIGITS, "--config.model=vit"], "--config.model is a section; set a key of it"),
        ([DIGITS, "--config.model.depth.x=3"], "depth"),
        ([f"{DIGITS}:x"], "configs/digits.py takes no argument; leave out ':x'"),
        ([DIGITS, "--workdir=/dev/null/x"], "--workdir=/dev/null/x: /dev/null is a file"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(arguments, says, tmp_path):
    done = script("train.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def get_config(:", "fails: SyntaxError"),
        ("import nothing_of_this_name", "fails: ModuleNotFoundError: No module named"),
        ("def get_config():\n  return 1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("x = 1", "fails: KeyError: 'get_config'"),
        ("def get_config():\n  return 5", "must return a ConfigDict, not 5"),
    ],
)
def test_a_config_file_that_fails(content, says, tmp_path):
    (tmp_path / "mine.py").write_text(content)
    done = script("train.py", f"--config={tmp_path}/mine.py", "--workdir=x")
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_help_is_quick_and_complete():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = script("train.py", "--help")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3
    assert done.returncode == 0
    for flag in ("--workdir", "--replace", "--help-attention", "--config.optimizer.warmup=100"):
        assert flag in done.stdout
    for name in vars(configs.Train()):
        assert f"\n{name}: " in done.stdout or f", {name}" in done.stdout, name
    assert "\npacking: how documents become rows" in done.stdout


def test_help_imports_no_jax():
    code = (
        "import sys, train\n"
        "train.main(['train.py', '--help'])\n"
        "sys.exit(sorted({'jax', 'flax', 'grain', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False)
    assert done.stderr.decode().strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say which run, for example --workdir=runs/digits"),
        (["--workdir=/nowhere"], "/nowhere holds no run: it has no config.json"),
        (["--workdir=/nowhere", "--limit=0"], "--limit=0"),
        (["--workdir=/nowhere", "--batch_size=x"], "--batch_size=x"),
    ],
)
def test_mistakes_with_eval(arguments, says):
    done = script("eval.py", *arguments)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_help_of_eval():
    done = script("eval.py", "--help")
    assert done.returncode == 0
    assert "--export_predictions" in done.stdout and "--split" in done.stdout
