"""The house rules that a machine can hold: floors, sizes, signatures, assertions that assert."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "kernels": 0,
    "efficient_attn.errors": 0,
    "efficient_attn.config": 1,
    "efficient_attn.data": 2,
    "efficient_attn.layers": 2,
    "efficient_attn.attention": 3,
    "efficient_attn.blocks": 4,
    "efficient_attn.backbones": 5,
    "efficient_attn.train": 6,
    "efficient_attn.evals": 6,
    "efficient_attn.tools": 7,
    "configs": 7,
    "configs.ablations": 8,
    "train": 8,
    "eval": 8,
}
OURS = ("efficient_attn", "kernels", "configs", "train", "eval", "tests")
KERNELS_MAY = {"jax", "numpy", "einops", "jaxtyping", "kernels"}
DATA_MAY = {"efficient_attn.errors", "efficient_attn.config", "efficient_attn.data"}


def sources():
    for top in ("efficient_attn", "kernels", "configs", "tests"):
        yield from sorted((ROOT / top).rglob("*.py"))
    yield from (ROOT / name for name in ("train.py", "eval.py") if (ROOT / name).exists())


FILES = [path.relative_to(ROOT) for path in sources()]
CODE = [path for path in FILES if path.parts[0] != "tests"]


def tree(path):
    return ast.parse((ROOT / path).read_text())


def module_of(path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(path) -> set[str]:
    """Every module that a file names in an import, inside functions as well, in full."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def place(name: str) -> str | None:
    """The floor's name of a module: its longest prefix in `FLOORS`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in FLOORS:
            return ".".join(parts[:end])
    return None


@pytest.mark.parametrize("path", CODE, ids=str)
def test_imports_go_down(path):
    if path == Path("efficient_attn/__init__.py"):
        assert not imported(path)
        return
    here = place(module_of(path))
    assert here is not None, f"{path} stands on no floor; give it one in FLOORS"
    for name in imported(path):
        if name.split(".")[0] not in OURS:
            continue
        there = place(name)
        assert there is not None, f"{path} imports {name}, which stands on no floor"
        # train and evals stand side by side: a training run evaluates, an evaluation restores
        beside = FLOORS[there] == FLOORS[here] == FLOORS["efficient_attn.train"]
        assert there == here or FLOORS[there] < FLOORS[here] or beside, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in CODE if p.parts[0] == "kernels"], ids=str)
def test_kernels_need_nothing_but_jax(path):
    import sys

    outside = {name.split(".")[0] for name in imported(path)} - KERNELS_MAY
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in CODE if "data" in p.parts], ids=str)
def test_data_knows_no_model(path):
    used = {place(n) for n in imported(path) if n.split(".")[0] in OURS}
    assert used <= DATA_MAY


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_import_public_names(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 350, f"{path}: ask what it is two of"
    for name in imported(path):
        private = [p for p in name.split(".") if p.startswith("_") and p != "__future__"]
        assert "_src" not in private, f"{path} imports {name}"
        if name.split(".")[0] not in OURS:
            assert not private, f"{path} imports {name}"


def test_no_function_of_ours_is_long_or_takes_anything():
    for path in CODE:
        pallas = any(part.startswith("pallas") for part in path.parts)
        for node in ast.walk(tree(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            name = getattr(node, "name", "lambda")
            if not pallas:  # which calls bodies by keyword
                assert node.args.kwarg is None, f"{path}: {name} takes **{node.args.kwarg.arg}"
            most = 100 if pallas else 60  # a kernel and its barriers are read in one piece
            if name != "lambda":
                assert node.end_lineno - node.lineno < most, f"{path}: {name} is over {most} lines"


def test_comparisons_in_tests_are_asserted():
    """`allclose(a, b)` on a line of its own compares and throws the answer away."""
    answers = {"allclose", "array_equal", "array_equiv", "isclose", "isfinite", "equal"}
    for path in FILES:
        if path.parts[0] != "tests":
            continue
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Expr):
                continue
            value = node.value
            assert not isinstance(value, ast.Compare), f"{path}:{node.lineno} compares in vain"
            called = value.func if isinstance(value, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in answers:
                raise AssertionError(f"{path}:{node.lineno} calls {called.attr} in vain")
