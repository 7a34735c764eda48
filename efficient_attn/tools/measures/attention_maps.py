"""Where a trained model of text looks: its attention maps, and its convolutions as such maps."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_attn import data
from efficient_attn.attention import Core, MultiHead
from efficient_attn.attention.lsra import LightweightKernel, LocalBranch
from efficient_attn.attention.softmax import Softmax
from efficient_attn.config import require
from efficient_attn.evals.run import restore
from efficient_attn.train.config import resolve
from efficient_attn.train.program import build
from efficient_attn.train.task import score
from efficient_attn.train.workdir import Workdir, read_json
from kernels import Mask, local_conv
from kernels.masked_softmax import masked_softmax


class Seen(nnx.Intermediate):
    """The weights of one attention layer."""


class Watched(Core):
    """The core it is given, which also sows softmax(q k^T / sqrt(D)) [B, H, T, S] as `Seen`."""

    def __init__(self, core: Softmax):
        require(
            core.config.logit_cap is None and core.kv_heads == core.site.heads,
            "attention maps are of softmax with a key head for each query head and without a cap",
        )
        self.core, self.config, self.site, self.watched = core, core.config, core.site, True

    def __call__(self, q, k, v, *, mask, shared):
        """What the core gives."""
        logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        seen = mask.visible(jnp.arange(q.shape[1]), k.shape[1])
        self.sow(Seen, "weights", masked_softmax(logits, seen))
        return self.core(q, k, v, mask=mask, shared=shared)


def trained(path: Path, *, examples: int) -> tuple[nnx.Module, Int[Array, "B T"]]:
    """The model of a finished run on text, and the first examples of its test split.

    Raises:
        UserError: no such run.
    """
    workdir = Workdir(path)
    experiment = resolve(read_json(workdir.config))
    dataset = data.load(experiment.data)
    program = build(experiment, dataset)
    _, state = restore(workdir, program, "last", score(dataset.info))
    source = dataset.splits["test"]
    inputs = source.gather(np.arange(min(examples, len(source))))["inputs"]
    return program.evaluated(state), jnp.asarray(inputs)


def softmax_maps(model: nnx.Module, inputs: Any) -> list[Float[Array, "B H T S"]]:
    """The weights of every softmax attention of the model on these inputs, layer by layer."""
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, MultiHead)]
    cores = [(layer, layer.core) for layer in layers if isinstance(layer.core, Softmax)]
    for layer, core in cores:
        layer.core = Watched(core)
    _, said = nnx.capture(model, Seen)(inputs, rngs=None)
    for layer, core in cores:
        layer.core = core
    found = {str(path): variable.get_value()[0] for path, variable in nnx.to_flat_state(said)}
    return [found[path] for path in sorted(found)]


def convolution_maps(model: nnx.Module, *, length: int, causal: bool) -> list[Float[Array, "T T"]]:
    """Of every lightweight convolution what a place takes from each place, the mean of its heads.

    Found by convolving impulses, so it is what the layer computes.
    """
    maps = []
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LocalBranch) and isinstance(module.kernel, LightweightKernel):
            weights = jax.nn.softmax(module.kernel(jnp.zeros((1, 1, 1))), axis=-1)
            heads = weights.shape[2]
            impulses = jnp.tile(jnp.eye(length)[:, :, None], (1, 1, heads))
            out = local_conv(impulses, weights, mask=Mask(causal=causal))
            maps.append(out.mean(axis=-1).T)
    return maps


def reach(weights: Float[np.ndarray, "T S"], *, near: int) -> tuple[float, float]:
    """(mean |t - s| under the weights of each row, share of the weights where |t - s| <= near).

    Rows count alike; each is normalised first.
    """
    weights = weights / weights.sum(axis=1, keepdims=True)
    apart = np.abs(np.arange(weights.shape[0])[:, None] - np.arange(weights.shape[1])[None])
    far = (weights * apart).sum(axis=1).mean()
    return float(far), float((weights * (apart <= near)).sum(axis=1).mean())


def attention_maps(
    path: Path, *, tokens: int = 48, examples: int = 32, near: int = 3
) -> dict[str, Any]:
    """Maps of a finished run of a causal model on text, over the first examples of its test split.

    Returns
        attention_map [T][T]: weights of the first `tokens` tokens, the mean over examples, heads
            and layers; attention_distance, attention_near: `reach` of it.
        convolution_map, convolution_distance, convolution_near: the same of lightweight
            convolutions, where the model has some.

    Raises:
        UserError: no such run, or it has no softmax attention.
    """
    model, inputs = trained(path, examples=examples)
    inputs = inputs[:, :tokens]
    weights = softmax_maps(model, inputs)
    require(len(weights) > 0, f"the model in {path} has no softmax attention to draw")
    maps = {"attention": np.mean([np.asarray(w).mean(axis=(0, 1)) for w in weights], axis=0)}
    convolutions = convolution_maps(model, length=inputs.shape[1], causal=True)
    if convolutions:
        maps["convolution"] = np.mean([np.asarray(w) for w in convolutions], axis=0)
    found: dict[str, Any] = {}
    for name, weight in maps.items():
        found[f"{name}_map"] = weight.astype(np.float64).round(4).tolist()
        found[f"{name}_distance"], found[f"{name}_near"] = reach(weight, near=near)
    return found
