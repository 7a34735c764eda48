"""Weights from and to safetensors: ours, and those of timm's and torchvision's networks.

A network's class says by `names` where each of its weights is found in theirs (`Rule`). Arrays are
turned by their shapes alone: a linear layer's is the transpose of theirs, a convolution's has its
windows first, and what they fused (queries, keys and values) is cut in equal parts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from efficient_attn.backbones.base import Backbone, Rule
from efficient_attn.errors import UserError

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
IGNORED = re.compile(
    r".*(num_batches_tracked|relative_position_index|attn_mask|attention_bias_idxs)"
)
"""What PyTorch's networks carry along and ours make anew."""


class Place(NamedTuple):
    """One of our arrays, and the rule by which it is found in theirs under the name `theirs`."""

    ours: str
    theirs: str
    rule: Rule
    kernel: bool


@dataclass(frozen=True)
class Report:
    """What a load found, by name.

    matched: ours that were read. missing: ours that the file lacks. unused: theirs that no array of
    ours asks for.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{len(self.matched)} arrays read"
        for what, found in (("not in the file", self.missing), ("not used", self.unused)):
            if found:
                text += f"; {len(found)} {what}: {', '.join(found[:5])}" + ", ..." * (
                    len(found) > 5
                )
        return text


def load(model: Backbone, path: str | Path, *, partial: bool = False) -> Report:
    """Fill the model, in place, with the arrays of a safetensors file, ours or timm's.

    With `partial` what the file lacks, or has in another shape, is left as it is.

    Raises:
        UserError: no such file, or not one of safetensors; without `partial`, arrays that are
            missing, left over or of another shape.
    """
    arrays, held, known = _read(Path(path)), dict(_arrays(model)), places(model)
    found, theirs = {n: arrays[n] for n in held if n in arrays}, _to_ours(held, known, arrays)
    used = set(found)
    if len(theirs) > len(found):  # both may call a layer "norm"
        found, used = theirs, {known[name].theirs for name in theirs}
    wrong = {n: x.shape for n, x in found.items() if x.shape != held[n].shape}
    if wrong and not partial:
        name, shape = next(iter(wrong.items()))
        raise UserError(
            f"{path} is of another network: {name} is {shape} there and {held[name].shape} here "
            f"({len(wrong)} differ); partial=True leaves those as they are"
        )
    found = {name: x for name, x in found.items() if name not in wrong}
    unused = [name for name in arrays if name not in used and not IGNORED.fullmatch(name)]
    report = Report(tuple(found), tuple(n for n in held if n not in found), tuple(unused))
    if (report.missing or report.unused) and not partial:
        raise UserError(f"{path} does not fit: {report}; partial=True takes what does")
    _fill(model, found)
    return report


def save(model: Backbone, path: str | Path, *, names: Literal["ours", "timm"] = "ours") -> None:
    """Write every array of the model to a safetensors file, under our names or under timm's.

    Raises:
        UserError: timm's names for a model with weights that it has none for, e.g. those of another
            attention.
    """
    held = {name: np.asarray(x) for name, x in _arrays(model)}
    if names == "timm":
        held = _to_theirs(model, held)
    save_file({name: np.ascontiguousarray(x) for name, x in held.items()}, Path(path))


def places(model: Backbone) -> dict[str, Place]:
    """Where each of the model's arrays is found in their network; what no rule names is left out.

    Works on a model of shapes alone (`nnx.eval_shape`).
    """
    rules = model.rules()
    found = {name: _place(rules, name) for name, _ in _arrays(model)}
    return {name: place for name, place in found.items() if place is not None}


def _place(rules: tuple[Rule, ...], name: str) -> Place | None:
    module, _, leaf = name.rpartition(".")
    for rule in rules:
        if match := re.fullmatch(rule.ours, name):
            return Place(name, match.expand(rule.theirs), rule, kernel=False)
        if leaf in LEAVES and (match := re.fullmatch(rule.ours, module)):
            theirs = f"{match.expand(rule.theirs)}.{LEAVES[leaf]}"
            return Place(name, theirs, rule, kernel=leaf == "kernel")
    return None


def _arrays(model: Backbone) -> Iterator[tuple[str, Any]]:
    """The numbers of a model by name; keys of random generators are none."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            yield ".".join(map(str, path)), value


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {error}") from None


def _to_ours(held: Mapping[str, Any], places: Mapping[str, Place], arrays: Mapping[str, Any]):
    """{our name: array} for all that is there."""
    found = {}
    for place in places.values():
        if place.theirs not in arrays:
            continue
        index, count = place.rule.part
        x = np.split(arrays[place.theirs], count)[index]
        if place.kernel:  # output channels last, windows first
            x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
        shape = held[place.ours].shape
        found[place.ours] = x.reshape(shape) if x.size == math.prod(shape) else x
    return found


def _to_theirs(model: Backbone, held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    known, parts = places(model), defaultdict(dict)
    for name, x in held.items():
        if name not in known:
            raise UserError(
                f"timm has no name for {name} of {type(model).__name__}; save it with names='ours'"
            )
        _, theirs, rule, kernel = known[name]
        if kernel and rule.channels:
            channels = rule.channels if rule.channels > 0 else x.shape[0]
            side = math.isqrt(x.shape[0] // channels)
            x = x.reshape(side, side, channels, -1)
        if kernel:
            x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
        parts[theirs][rule.part[0]] = x.reshape((1,) * rule.lead + x.shape)
    return {name: np.concatenate([x for _, x in sorted(p.items())]) for name, p in parts.items()}


def _fill(model: Backbone, arrays: Mapping[str, np.ndarray]) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if (name := ".".join(map(str, path))) in arrays:
            variable.set_value(jnp.asarray(arrays[name], variable.get_value().dtype))
