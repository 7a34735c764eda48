"""Networks that drop patches, against the papers' equations written out, and published counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.backbones.base import Objective
from efficient_attn.backbones.images import dynamicvit
from efficient_attn.errors import UserError
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.tools.count import multiply_adds
from tests.support import fast, relative

TINY = {"width": 16, "heads": 2, "depth": 3, "patch": 8, "layers": (2, 3)}
NAMES = ("evit_small", "dynamicvit_deit_small", "avit_tiny")


def make(name, *, attention="native", **options):
    model = backbones.create(
        name, TINY | options, attention=attention, image_size=32, num_classes=5, rngs=make_rngs(0)
    )
    random = np.random.default_rng(0)

    def fill(x):  # biases of 0 and scales of 1 hide faults
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x + jnp.asarray(0.1 * random.standard_normal(x.shape), x.dtype)

    nnx.update(model, jax.tree.map(fill, nnx.state(model, nnx.Param)))
    return model


def images(count=3):
    drawn = np.random.default_rng(1).standard_normal((count, 32, 32, 3))
    return jnp.asarray(drawn, jnp.float32)


def logits(model, x, rngs=None):
    return np.asarray(jax.jit(lambda x: model(x, rngs=rngs), compiler_options=fast())(x))


def trained(model, x, seed=0):
    """Logits in training, and what the model asks for by name."""
    graph, state = nnx.split(model)

    def call(state, x):
        merged = nnx.merge(graph, state)
        return nnx.capture(merged, Objective)(x, rngs=nnx.Rngs(dropout=seed))

    out, said = jax.jit(call, compiler_options=fast())(state, x)
    return np.asarray(out), {k: np.asarray(v) for k, v in nnx.to_pure_dict(said).items()}


class Formulas:
    """The parts of a vision transformer in float64, from a model's weights."""

    def __init__(self, model):
        self.w = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(
            nnx.state(model, nnx.Param)))  # fmt: skip
        self.heads, self.step = model.config.heads, model.config.branch_scale

    def linear(self, x, w):
        return x @ w["kernel"] + w["bias"]

    def norm(self, x, w, epsilon=1e-6):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * w["scale"] + w["bias"]

    def gelu(self, x):
        return np.asarray(x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2)

    def tokens(self, image):
        p, side = 8, 4
        patches = np.asarray(image).reshape(side, p, side, p, 3).swapaxes(1, 2).reshape(side**2, -1)
        x = self.linear(patches.astype(np.float64), self.w["embed"])
        return np.concatenate([self.w["cls"][0], x]) + self.w["positions"]

    def attention(self, x, w, seen=None):
        """(what attention adds, weights [H, T, T])."""
        y = self.norm(x, w["mixer_norm"])
        split = lambda z: z.reshape(len(x), self.heads, -1).swapaxes(0, 1)  # noqa: E731
        q, k, v = (split(self.linear(y, w["mixer"][n])) for n in ("query", "key", "value"))
        a = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        a = np.exp(a - a.max(-1, keepdims=True)) * (1 if seen is None else seen)
        a /= a.sum(-1, keepdims=True)
        return self.linear((a @ v).swapaxes(0, 1).reshape(x.shape), w["mixer"]["out"]), a

    def mlp(self, x, w):
        hidden = self.gelu(self.linear(self.norm(x, w["mlp_norm"]), w["mlp"]["expand"]))
        return self.linear(hidden, w["mlp"]["contract"])

    def classify(self, x):
        x = self.norm(x, self.w["stack"]["norm"])
        return self.linear(x[0], self.w["classifier"]["linear"])

    def blocks(self):
        return [self.w["stack"]["blocks"][i] for i in range(len(self.w["stack"]["blocks"]))]


@pytest.mark.parametrize("name", NAMES)
def test_keeping_every_patch_is_the_plain_network(name):
    model = make(name, keep_rate=1.0, **({"gate_center": 1e4} if name == "avit_tiny" else {}))
    plain = {k: v for k, v in TINY.items() if k != "layers"}
    vit = backbones.create("deit_tiny_patch16_224", plain, image_size=32, num_classes=5)
    mine = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mine.pop("predictors", None)
    nnx.update(vit, mine)
    np.testing.assert_allclose(logits(model, images()), logits(vit, images()), atol=2e-5)


@pytest.mark.parametrize("rest", ["fuse", "drop"])
def test_evit_is_its_paper(rest):
    model = make("evit_small", keep_rate=0.6, rest=rest)
    expected = []
    for image in images():
        f = Formulas(model)
        x = f.tokens(image)
        for layer, w in enumerate(f.blocks(), start=1):
            added, weights = f.attention(x, w)
            x = x + added
            if layer in TINY["layers"]:
                a = weights[:, 0, 1:].mean(0)
                order = np.argsort(-a)
                count = int(np.ceil(0.6 * len(a)))
                kept, others = order[:count], order[count:]
                fused = (a[others, None] * x[1:][others]).sum(0, keepdims=True)
                x = np.concatenate([x[:1], x[1:][kept], *([fused] if rest == "fuse" else [])])
            x = x + f.mlp(x, w)
        expected.append(f.classify(x))
    assert relative(logits(model, images()), np.stack(expected)) < 1e-5


def scores(f, x, w, kept):
    y = f.gelu(f.linear(f.norm(x, w["norm"], 1e-5), w["look"]))
    half = y.shape[1] // 2
    seen = (y[:, half:] * kept[:, None]).sum(0) / kept.sum()
    y = np.concatenate([y[:, :half], np.tile(seen, (len(y), 1))], axis=1)
    for i in range(2):
        y = f.gelu(f.linear(y, w["layers"][i]))
    return f.linear(y, w["out"])


def dynamic(f, image):
    """The logits of one image by DynamicViT at keep rate 0.6."""
    x, stage = f.tokens(image), 0
    for layer, w in enumerate(f.blocks(), start=1):
        if layer in TINY["layers"]:
            y = scores(f, x[1:], f.w["predictors"][stage], np.ones(len(x) - 1))
            stage += 1
            kept = np.argsort(-(y[:, 0] - y[:, 1]))[: int(16 * 0.6**stage)]
            x = np.concatenate([x[:1], x[1:][kept]])
        x = x + f.step * f.attention(x, w)[0]
        x = x + f.step * f.mlp(x, w)
    return f.classify(x)


def test_dynamicvit_is_its_paper():
    model = make("dynamicvit_deit_small", keep_rate=0.6)
    expected = [dynamic(Formulas(model), image) for image in images()]
    assert relative(logits(model, images()), np.stack(expected)) < 1e-5


def test_dynamicvit_hides_in_training_what_it_drops_in_evaluation(monkeypatch):
    """The same decisions: logits are equal but for the epsilon of the masked softmax."""
    model = make("dynamicvit_deit_small", keep_rate=0.6)
    stage = []

    def decide(chances, rngs):
        stage.append(0)
        alive = decide.kept
        score = jnp.where(alive > 0, chances[..., 0], -jnp.inf)
        least = jnp.sort(score, axis=1)[:, -int(16 * 0.6 ** len(stage))][:, None]
        decide.kept = (score >= least).astype(jnp.float32)
        return decide.kept

    decide.kept = jnp.ones((3, 16))
    monkeypatch.setattr(dynamicvit, "decide", decide)
    out, said = trained(model, images())
    assert relative(out, logits(model, images())) < 1e-4
    for s, asked in enumerate(said["ratio"], start=1):
        miss = int(16 * 0.6**s) / 16 - 0.6**s
        np.testing.assert_allclose(asked, 2 / 2 * miss**2, rtol=1e-4, atol=1e-9)


def test_dynamicvit_draws_by_chance_and_its_predictors_learn():
    model = make("dynamicvit_deit_small")
    chances = jnp.log(jnp.broadcast_to(jnp.array([0.3, 0.7]), (200, 50, 2)))
    drawn = np.asarray(dynamicvit.decide(chances, nnx.Rngs(dropout=0)))
    assert abs(drawn.mean() - 0.3) < 0.02 and set(np.unique(drawn.round(5))) == {0.0, 1.0}
    graph, params = nnx.split(model)

    def loss(params):
        call = nnx.capture(nnx.merge(graph, params), Objective)
        return call(images(), rngs=nnx.Rngs(dropout=1))[0].sum()

    grads = jax.jit(jax.grad(loss), compiler_options=fast())(params)
    for stage in nnx.to_pure_dict(grads)["predictors"].values():
        assert float(jnp.abs(stage["look"]["kernel"]).max()) > 0


def course(model, image):
    """A-ViT's tokens one layer after the other: (logits, n_k + r_k of each, scores by layer)."""
    f, c = Formulas(model), model.config
    x = f.tokens(image)
    total, done, cost = np.zeros(17), np.zeros(17, bool), np.zeros(17)
    out, means = np.zeros_like(x), []
    for layer, w in enumerate(f.blocks(), start=1):
        x = np.where(done[:, None], 0, x)
        seen = ~done[None, None]
        if done.all():
            means.append(0.0)
            continue
        x = x + f.attention(x, w, seen)[0]
        x = x + f.mlp(x, w)
        h = 1 / (1 + np.exp(c.gate_center - c.gate_scale * x[:, 0]))
        means.append((h * ~done).mean())
        h = np.ones(17) if layer == 3 else h
        for k in np.flatnonzero(~done):
            cost[k] += 1
            if total[k] + h[k] >= 1 - c.epsilon:
                out[k] += (1 - total[k]) * x[k]
                cost[k] += 1 - total[k]
                done[k] = True
            else:
                out[k] += h[k] * x[k]
            total[k] += h[k]
    return f.classify(out), cost, means


def test_avit_is_its_paper():
    model = make("avit_tiny", gate_scale=2.0, gate_center=1.0)
    courses = [course(model, image) for image in images()]
    costs = np.stack([cost for _, cost, _ in courses])
    assert len(np.unique(costs.round(3))) > 10, "tokens halt at several layers"
    out, said = trained(model, images())
    expected = np.stack([found for found, _, _ in courses])
    assert relative(out, expected) < 1e-5
    assert relative(logits(model, images()), expected) < 1e-5
    np.testing.assert_allclose(said["ponder"][0], 5e-4 * costs.mean(1), rtol=1e-5)
    share = np.mean([means for _, _, means in courses], axis=0)
    share = np.clip(share / share.sum(), 0.01, 0.99)
    target = np.exp(-0.5 * (np.arange(3) - 8.0) ** 2)
    target *= 0.98 / target.sum()
    np.testing.assert_allclose(
        said["prior"][0], 1e-3 * max(np.mean(target * np.log(target / share)), 0), rtol=1e-4
    )


def test_avit_with_room_for_those_that_run_is_exact():
    """All patches halt at once; the class token goes on alone."""
    model = make("avit_tiny", gate_scale=0.0, gate_center=-9.0)
    small = make("avit_tiny", gate_scale=0.0, gate_center=-9.0, keep_rate=0.3)
    np.testing.assert_allclose(logits(small, images()), logits(model, images()), atol=1e-5)
    running = {"gate_scale": 0.0, "gate_center": 9.0}
    few, all_ = make("avit_tiny", keep_rate=0.3, **running), make("avit_tiny", **running)
    assert relative(logits(few, images()), logits(all_, images())) > 1e-3


def counted(name, **options):
    """Multiply-adds of one image."""
    graph, state = nnx.split(nnx.eval_shape(lambda: backbones.create(name, options)))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return multiply_adds(lambda s, x: nnx.merge(graph, s)(x, rngs=None), state, image)


@pytest.mark.parametrize(
    ("name", "rate", "published"),
    [
        ("evit_small", 1.0, 4.6), ("evit_small", 0.7, 3.0), ("evit_small", 0.5, 2.3),
        *(
            pytest.param("evit_small", *case, marks=pytest.mark.slow)
            for case in ((0.9, 4.0), (0.8, 3.5), (0.6, 2.6))
        ),
    ],
)  # fmt: skip
def test_multiply_adds_are_the_published_ones(name, rate, published):
    assert counted(name, keep_rate=rate) / 1e9 == pytest.approx(published, abs=0.051)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        pytest.param("dynamicvit_deit_256", 1.3, marks=pytest.mark.slow),
        ("dynamicvit_deit_small", 2.9),
        pytest.param("dynamicvit_deit_base", 11.4, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_dynamicvits_published_figures_are_cut_off_not_rounded(name, published):
    assert int(counted(name, keep_rate=0.7) / 1e8) / 10 == published


def parameters(name, **options):
    model = nnx.eval_shape(lambda: backbones.create(name, options))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_dropping_adds_no_parameters_but_predictors():
    small = 22_050_664
    assert parameters("evit_small") == small
    assert parameters("avit_tiny") == 5_717_416
    e = 384
    predictor = 2 * e + (e + 1) * e + (e + 1) * e // 2 + (e // 2 + 1) * e // 4 + (e // 4 + 1) * 2
    assert parameters("dynamicvit_deit_small") == small + 3 * predictor  # 22.8 M


@pytest.mark.parametrize("attention", ["performer(features=16)", "linear", "softmax(kv_heads=1)"])
def test_evit_takes_any_attention_with_queries_and_keys(attention):
    found = logits(make("evit_small", attention=attention, keep_rate=0.5), images())
    assert found.shape == (3, 5) and np.isfinite(found).all()


def test_dynamicvit_with_grouped_heads():
    out, _ = trained(make("dynamicvit_deit_small", attention="softmax(kv_heads=1)"), images())
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("name", "options", "attention", "says"),
    [
        *((name, {"keep_rate": rate}, "native", r"keep_rate must be in \(0, 1\], not ")
          for name in NAMES for rate in (0.0, -0.5, 1.01)),
        ("evit_small", {"layers": (3, 2)}, "native", r"layers=\(3, 2\) must rise"),
        ("evit_small", {"layers": (3, 4)}, "native", "to depth=3 at most"),
        ("evit_small", {"pool": "mean", "placed": False}, "native", "pool='mean' has no class"),
        ("evit_small", {}, "synthesizer", "no queries and keys of its own; use one that has"),
        ("dynamicvit_deit_small", {}, "linear", "through the weights of softmax, and linear has"),
        ("avit_tiny", {"pool": "dense"}, "native", "avit keeps none; use pool='cls'"),
        ("avit_tiny", {}, "gla", "gla does not support bidirectional"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(name, options, attention, says):
    with pytest.raises(UserError, match=says):
        nnx.eval_shape(lambda: make(name, attention=attention, **options))


def test_there_is_no_map_of_what_is_left():
    with pytest.raises(UserError, match="no map of features"):
        make("evit_small").features(images())


def test_a_distillation_token_stays():
    model = make("evit_small", pool="distilled", keep_rate=0.3)
    first, second = jax.jit(lambda x: model.heads(x), compiler_options=fast())(images())
    np.testing.assert_allclose(logits(model, images()), (first + second) / 2, atol=1e-5)
    assert not np.allclose(first, second)
