"""What docs/ shows is what there is: worked examples run, links lead somewhere."""

import re
import sys
import types
from urllib.parse import unquote

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention, backbones, data
from efficient_attn.data import Config, Text
from efficient_attn.errors import UserError
from efficient_attn.train import config as configs
from kernels import reference
from tests import support
from tests.attention import test_contract as contract
from tests.attention import test_decode as decode
from tests.attention import test_numerics as numerics
from tests.backbones import test_contract as learning
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def example(page: str, name: str) -> str:
    """The code block of docs/PAGE.md that follows <!-- example: NAME -->."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found, f"docs/{page}.md has no example {name}"
    return found[1]


@pytest.fixture
def written(monkeypatch):
    """Make a module of a page's code block, to be imported as if the file were there."""

    def write(page: str, path: str) -> types.ModuleType:
        name = path.removesuffix(".py").replace("/", ".")
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(example(page, path), f"docs/{page}.md: {path}", "exec"), vars(module))
        return module

    return write


@pytest.fixture
def ema(written, monkeypatch):
    """The mechanism of the page, in the tables of the code and of the tests."""
    module = written("add_a_mechanism", "efficient_attn/attention/ema.py")
    tested = written("add_a_mechanism", "tests/mechanisms/ema.py")
    monkeypatch.setitem(attention.MIXERS, "ema", module.Ema)
    monkeypatch.setitem(support.MECHANISMS, "ema", tested)
    return tested


def test_the_mechanism_is_its_formula_and_passes_the_contract(ema):
    numerics.check("ema", support.draw_x("ema", 63), **numerics.mask_arrays("causal", 63))
    contract.test_no_output_has_a_derivative_by_a_later_input("ema")


def test_the_mechanism_decodes(ema):
    decode.test_steps_equal_the_causal_forward_pass("ema", "none")
    decode.test_a_prompt_is_read_in_parallel("ema")
    decode.test_a_prompt_read_at_once_leaves_the_state_of_its_last_token("ema", "none")
    decode.test_the_state_has_the_bytes_that_cost_says("ema")


def test_the_mechanism_says_what_it_has(ema):
    sizes = jax.tree.leaves(nnx.state(support.holder("ema"), nnx.Param))
    assert sum(leaf.size for leaf in sizes) == ema.VARIANTS["ema"]
    with pytest.raises(UserError, match="start=1.5 must be between 0 and 1"):
        attention.pattern("ema(start=1.5)", 1)


@pytest.fixture
def looped(written, monkeypatch):
    module = written("add_a_backbone", "efficient_attn/backbones/looped.py")
    entry = learning.Entry(learning.SMALL, learning.TOKENS, frozenset({"padding", "bidirectional"}))
    monkeypatch.setitem(backbones.BACKBONES, "looped", module.Looped)
    monkeypatch.setitem(learning.OPTIONS, "looped", entry)
    return entry


def test_the_backbone_sees_no_padding_and_refuses_what_it_cannot_take(looped):
    made = learning.model("looped", "softmax", depth=1)
    tokens, _ = learning.batch(looped.source)
    cut = tokens.at[:, 10:].set(0)
    np.testing.assert_allclose(
        learning.logits(made, cut), learning.logits(made, cut[:, :10]), rtol=1e-5, atol=1e-5
    )
    learning.test_it_learns_or_is_refused_in_a_sentence("looped", "gla")
    with pytest.raises(UserError, match="reads tokens, not images"):
        backbones.create("looped", attention="softmax", source=learning.IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("expression", ["softmax", "performer"])
def test_the_backbone_learns(looped, expression):
    learning.test_it_learns_or_is_refused_in_a_sentence("looped", expression)


def test_loops_of_the_backbone_add_no_parameters(looped):
    def sizes(loops):
        made = nnx.eval_shape(
            lambda: backbones.create(
                "looped", learning.SMALL | {"loops": loops}, attention="softmax",
                source=learning.TOKENS, rngs=nnx.Rngs(0),
            )
        )  # fmt: skip
        return [leaf.shape for leaf in jax.tree.leaves(nnx.state(made, nnx.Param))]

    assert sizes(1) == sizes(4)


@pytest.fixture
def majority(written, monkeypatch):
    module = written("add_a_task", "efficient_attn/data/majority.py")
    monkeypatch.setitem(data.DATASETS, "majority", module.load)
    return written("add_a_task", "configs/majority.py").get_config


def test_the_task_is_what_it_says(majority):
    dataset = data.load(Config(name="majority", text=Text(max_len=9)))
    test = dataset.splits["test"].gather(np.arange(1000))
    ones, twos = ((test["inputs"] == token).sum(1) for token in (1, 2))
    np.testing.assert_array_equal(test["label"], twos > ones)
    assert set(ones + twos) == {1, 3, 5, 7, 9}
    other = data.load(Config(name="majority", text=Text(max_len=9), seed=1)).splits["test"]
    assert not np.array_equal(other.gather(np.arange(1000))["inputs"], test["inputs"])
    train = dataset.splits["train"].gather(np.arange(1000))
    assert not np.array_equal(train["inputs"], test["inputs"])


def test_the_tasks_config_is_one(majority):
    experiment = configs.resolve(majority())
    assert experiment.data.name == "majority" and experiment.model["width"] == 32


@pytest.mark.slow
def test_the_task_is_learned_as_its_config_says(majority, tmp_path):
    from efficient_attn.train.loop import train

    result = train(configs.resolve(majority()), tmp_path)
    assert result["test"]["accuracy"] > 0.95


def test_the_kernel_passes_its_test(written, monkeypatch):
    """Its own test file, as the page has it."""
    added = dict(vars(reference))
    exec(example("add_a_kernel", "kernels/reference.py, added"), added)
    monkeypatch.setattr(reference, "fading_sum", added["fading_sum"], raising=False)
    written("add_a_kernel", "kernels/fading_sum.py")
    tests = written("add_a_kernel", "tests/kernels/test_fading_sum.py")
    for backend in ("xla", "pallas"):
        tests.test_output_and_gradients_are_the_references(63, "padding", backend)
    tests.test_output_and_gradients_are_the_references(1, "none", "pallas")
    tests.test_what_the_kernel_does_not_take_is_refused()


def prose(path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^(    |\t).*$|`[^`\n]*`", "", text, flags=re.MULTILINE)


def anchors(path) -> set[str]:
    """The headings of a page as GitHub and the site name them."""
    words = [line.lstrip("#").strip().lower() for line in path.read_text().splitlines()
             if re.match(r"#+ ", line)]  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in words}


def broken(path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)", prose(path)):
        place, _, anchor = unquote(link).partition("#")
        there = path.parent / place if place else path
        if re.match(r"\w+:", link):
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: its *end*\n[a](page.md) [b](gone.md) [c](#a-heading-its-end) [d](#gone)\n"
        "`[e](x)` ![f](gone.png) [g](https://h.example/i)\n```\n[j](k)\n```\n"
    )
    assert broken(page) == ["gone.md", "#gone", "gone.png"]
