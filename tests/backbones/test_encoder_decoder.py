"""The encoder-decoder by its formula: what is seen, decoding, embeddings, and the two searches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.backbones import Input
from efficient_attn.errors import UserError
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.tools.count import multiply_adds
from tests import support

END, START, VOCAB, S, T = 1, 2, 7, 9, 6
SOURCE = Input(kind="translation", shape=(S, T), classes=VOCAB, vocab=VOCAB)
SMALL = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0}
MIXED = {
    "encoder_attention": "linformer(rank=3) + softmax",
    "cross_attention": "linformer(rank=2)",
    "decoder_depth": 1,
    "norm": "post",
    "positions": "rotary",
    "tied": "none",
}
CASES = {
    "softmax": {},
    "performer(features=8)": MIXED,
    "lsra": {"positions": "learned", "tied": "output", "mlp_ratio": 1.0},
}
CROSS = {
    e: {"cross_attention": e, "depth": 1}
    for e in support.those_with("cross", "causal")
    if e in support.FIRSTS and e not in CASES
}
"""What else may look at the source; linformer and softmax do above."""


def create(expression="softmax", source=SOURCE, seed=0, dtype=jnp.float32, **options):
    return backbones.create(
        "encoder_decoder", SMALL | options, attention=expression, source=source, dtype=dtype,
        rngs=make_rngs(seed),
    )  # fmt: skip


@functools.cache
def made(expression):
    return create(expression, **(CASES | CROSS)[expression])


@functools.cache
def compiled(expression):
    graph, state = nnx.split(made(expression))
    call = lambda state, inputs: nnx.merge(graph, state)(inputs, rngs=None)  # noqa: E731
    return functools.partial(jax.jit(call, compiler_options=support.fast()), state)


def forward(expression, inputs):
    return np.asarray(compiled(expression)(inputs))


def batch():
    random = np.random.default_rng(0)
    source, target = random.integers(3, VOCAB, (4, S)), random.integers(3, VOCAB, (4, T))
    source[1, 5:] = 0
    source[3] = 0
    target[:, 0] = START
    return {name: jnp.asarray(x, jnp.int32) for name, x in (("source", source), ("target", target))}


@pytest.mark.parametrize("expression", CASES)
def test_who_sees_what(expression):
    """Logits depend on the targets up to their place and on the source that is not padding."""
    inputs = batch()
    before = forward(expression, inputs)
    assert before.shape == (4, T, VOCAB)
    assert np.isfinite(before).all()
    later = inputs | {"target": inputs["target"].at[:, 3:].set(6)}
    after = forward(expression, later)
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert np.abs(after[:, 3:] - before[:, 3:]).max(axis=(1, 2)).min() > 1e-3
    other = inputs | {"source": inputs["source"].at[0, 2].set(3).at[1, 4].set(6)}
    moved = np.abs(forward(expression, other) - before).max(axis=(1, 2))
    assert moved[:2].min() > 1e-4
    assert moved[2:].max() == 0


@pytest.mark.parametrize("expression", CASES)
def test_padding_behind_the_source_changes_nothing(expression):
    inputs = batch()
    inputs["source"] = inputs["source"].at[:, 5:].set(0)
    short = inputs | {"source": inputs["source"][:, :5]}
    np.testing.assert_allclose(
        forward(expression, inputs), forward(expression, short), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("expression", CASES | CROSS)
def test_token_by_token_equals_the_forward_pass(expression):
    inputs = batch()
    expected = forward(expression, inputs)
    graph, weights = nnx.split(made(expression))

    def decode(weights, inputs):
        model = nnx.merge(graph, weights)
        memory, state = model.init_cross(inputs["source"]), model.init_state(4)
        said = []
        for place in range(T):
            at = jnp.full(4, place)
            out, state = model.step(inputs["target"][:, place], state, position=at, memory=memory)
            said.append(out)
        return jnp.stack(said, axis=1)

    said = jax.jit(decode, compiler_options=support.fast())(weights, inputs)
    np.testing.assert_allclose(said, expected, rtol=1e-4, atol=1e-5)


def attend(x, y, w, mask):
    """Multi-head attention of x [T,E] to y [S,E], loops over the two heads."""
    q, k, v = (
        a @ w[name]["kernel"] + w[name]["bias"]
        for a, name in ((x, "query"), (y, "key"), (y, "value"))
    )
    heads = []
    for columns in (slice(0, 8), slice(8, 16)):
        logits = np.where(mask, q[:, columns] @ k[:, columns].T / np.sqrt(8), -np.inf)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, columns])
    return np.concatenate(heads, axis=1) @ w["out"]["kernel"] + w["out"]["bias"]


def norm(x, w):
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * w["scale"] + w["bias"]


def test_it_is_the_transformer_of_the_paper():
    """Post-norm, ReLU, sinusoids, one embedding: float64 from the paper's formulas (1706.03762)."""
    model = create(norm="post", mlp="relu")
    leaves, rebuild = jax.tree.flatten(nnx.state(model))
    random = np.random.default_rng(5)
    leaves = [x + 0.1 * random.standard_normal(x.shape).astype(np.float32) for x in leaves]
    nnx.update(model, jax.tree.unflatten(rebuild, leaves))
    w = support.weights(model)
    inputs = batch()
    table = w["source_embed"]["embedding"]
    angles = np.arange(S)[:, None] * 10_000.0 ** (-np.arange(0, 16, 2) / 16)[None]
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def hidden(x, block):
        middle = np.maximum(
            x @ block["mlp"]["expand"]["kernel"] + block["mlp"]["expand"]["bias"], 0
        )
        return middle @ block["mlp"]["contract"]["kernel"] + block["mlp"]["contract"]["bias"]

    def layers(name):
        return [w[name]["blocks"][i] for i in range(2)]

    expected = []
    for row in range(3):
        source, target = (np.asarray(inputs[name][row]) for name in ("source", "target"))
        seen = (source != 0)[None]
        y = 4.0 * table[source] + waves
        for block in layers("encoder"):
            y = norm(y + attend(y, y, block["mixer"], seen), block["mixer_norm"])
            y = norm(y + hidden(y, block), block["mlp_norm"])
        x = 4.0 * table[target] + waves[:T]
        for block in layers("decoder"):
            past = np.tril(np.ones((T, T), bool))
            x = norm(x + attend(x, x, block["mixer"], past), block["mixer_norm"])
            x = norm(x + attend(x, y, block["cross"], seen), block["cross_norm"])
            x = norm(x + hidden(x, block), block["mlp_norm"])
        expected.append(x @ table.T)
    out = model(inputs)
    np.testing.assert_allclose(out[:3], np.stack(expected), rtol=1e-4, atol=1e-4)


def size(**options):
    shapes = nnx.eval_shape(lambda: create(**options))
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


def test_tied_embeddings_are_one_matrix():
    table = VOCAB * 16
    assert size(tied="output") - size() == table
    assert size(tied="none") - size() == 2 * table
    assert size(positions="learned") - size(positions="none") == (S + T) * 16
    assert size(decoder_depth=1) < size(decoder_depth=2) == size()


def test_every_stack_has_the_mechanism_that_it_is_given():
    model = made("performer(features=8)")
    kinds = [type(block.mixer.core).__name__ for block in model.encoder.blocks]
    assert kinds == ["Linformer", "Softmax"]
    (block,) = model.decoder.blocks
    assert type(block.mixer.core).__name__ == "Performer"
    assert type(block.cross.core).__name__ == "Linformer"
    assert block.cross.core.site.seq == S
    assert [type(b.mixer).__name__ for b in made("lsra").encoder.blocks] == ["Lsra"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expression": "linformer"}, "does not support causal, decode, which this model needs"),
        ({"cross_attention": "lsra"}, "lsra does not support cross, which this model needs; use"),
        ({"positions": "alibi", "encoder_attention": "linformer"}, "does not support alibi"),
        ({"decoder_depth": -1}, "decoder_depth=-1 must not be negative"),
        ({"cross_attention": "sofmax"}, "did you mean 'softmax'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: create(**options))


def test_longer_or_other_inputs_are_refused():
    inputs = batch()
    model = made("softmax")
    with pytest.raises(ValueError, match="7 target tokens, but the model was built for 6"):
        model(inputs | {"target": jnp.ones((4, T + 1), jnp.int32)})
    with pytest.raises(UserError, match="max_len=7 exceeds the 6 of the model"):
        model.translate(inputs["source"], start=START, end=END, max_len=7)
    for name, token in (("start", 0), ("end", 50), ("end", VOCAB)):
        with pytest.raises(UserError, match=f"{name}={token} is not a token id from 1 to 6"):
            model.translate(inputs["source"], **{"start": START, "end": END, name: token})
    with pytest.raises(UserError, match="reads translations, not tokens; use model.name='encoder'"):
        create(source=Input(kind="tokens", shape=(9,), classes=3, vocab=7))


@pytest.mark.parametrize("expression", CASES)
def test_beam_search_is_exhaustive_when_it_may_be_and_greedy_with_one(expression):
    """Against the forward pass over every sequence of up to three tokens."""
    source, length = batch()["source"][:3], 3
    words = [w for n in range(length) for w in itertools.product(range(3, VOCAB), repeat=n)]
    endings = [(*w, END) for w in words]
    assert len(endings) == 21
    targets = np.zeros((21, T), np.int32)
    for row, sequence in zip(targets, endings, strict=True):
        row[: len(sequence)] = [START, *sequence[:-1]]
    every = {
        "source": jnp.repeat(source, 21, axis=0),
        "target": jnp.tile(jnp.asarray(targets), (3, 1)),
    }
    chances = jax.nn.log_softmax(forward(expression, every)).reshape(3, 21, T, VOCAB)
    scores = np.array(
        [
            [sum(float(c[t, token]) for t, token in enumerate(s)) / ((5 + len(s)) / 6) ** 0.6
             for c, s in zip(chances[row], endings, strict=True)]
            for row in range(3)
        ]
    )  # fmt: skip
    graph, weights = nnx.split(made(expression))

    def search(weights, beam):
        model = nnx.merge(graph, weights)
        return model.translate(source, start=START, end=END, beam=beam, max_len=length)

    search = jax.jit(search, static_argnums=1, compiler_options=support.fast())
    found = search(weights, 21)
    for row in range(3):
        order = np.argsort(-scores[row])
        np.testing.assert_allclose(found.scores[row], scores[row][order], rtol=1e-4, atol=1e-5)
        best = endings[order[0]]
        assert found.tokens[row, 0, : len(best)].tolist() == list(best)
    greedy = search(weights, 1)
    for row in range(3):
        written = []
        while END not in written:
            place = next(i for i, w in enumerate(words) if w == tuple(written))
            c = np.array(chances[row, place, len(written)])
            c[[0, START]] = -np.inf
            written.append(END if len(written) == length - 1 else int(c.argmax()))
        assert greedy.tokens[row, 0, : len(written)].tolist() == written


def test_one_token_may_begin_and_end_a_text():
    found = made("softmax").translate(batch()["source"][:2], start=END, end=END, beam=2, max_len=3)
    assert np.isfinite(found.scores).all() and (found.tokens == END).any(axis=-1).all()


def test_logits_are_float32_under_bfloat16():
    model = nnx.eval_shape(lambda: create("lsra", dtype=jnp.bfloat16))
    graph, state = nnx.split(model)
    call = lambda s, x: nnx.merge(graph, s)(x, rngs=None)  # noqa: E731
    out = jax.eval_shape(call, state, batch())
    assert (out.shape, out.dtype) == ((4, T, VOCAB), jnp.float32)


LITE = {
    "iwslt": "lsra(conv='lightweight', gate='linear', kernel=(3, 7, 15, 31))",
    "wmt": "lsra(kernel=(3, 7, 15, 31))",
}


@pytest.mark.parametrize(
    ("setting", "width", "millions"),
    [
        ("iwslt", 160, 54), ("iwslt", 240, 119), ("iwslt", 320, 209),
        ("wmt", 200, 90), ("wmt", 408, 360), ("wmt", 496, 527),
    ],
)  # fmt: skip
def test_lite_transformer_costs_what_its_paper_says(setting, width, millions):
    """Multiply-adds of 2004.11886's tables, 30 tokens in and out, six blocks and six.

    Counted like this, matrix products without the score over the vocabulary, they come out to
    0.35 %: 54.1, 119.2, 209.7, 90.0, 359.2, 527.0 million. The convolution's taps, which are no
    matrix products, would add 0.6 to 1.8 million.
    """
    source = Input(kind="translation", shape=(30, 30), classes=3, vocab=3)
    options = {"depth": 6, "width": width, "heads": 4, "mlp_ratio": 1.0}
    graph, state = nnx.split(
        nnx.eval_shape(lambda: create(LITE[setting], source=source, **options))
    )
    tokens = jax.ShapeDtypeStruct((1, 30), jnp.int32)

    def forward(state, inputs):
        return nnx.merge(graph, state)(inputs, rngs=None)

    counted = multiply_adds(forward, state, {"source": tokens, "target": tokens})
    ours = (counted - 30 * width * 3) / 1e6
    print(f"{setting} {width}: {ours:.1f} million multiply-adds, the paper {millions}")
    assert ours == pytest.approx(millions, rel=0.0035)
