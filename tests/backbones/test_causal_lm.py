"""The language model: causality, packed documents, and generation equal to full passes."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.backbones import CausalLM, Sampling, generate
from efficient_attn.backbones.generation import check_prompts
from efficient_attn.backbones.sampling import GREEDY
from efficient_attn.errors import UserError
from efficient_attn.layers.rngs import make_rngs
from tests import support
from tests.backbones.test_contract import SMALL, TEXT, TOKENS, batch, logits

STEPS, PROMPT, VOCAB = 256, 40, 11
LONG = replace(TEXT, shape=(STEPS,))


def create(attention="softmax", source=TEXT, seed=0, **options):
    return backbones.create(
        "causal_lm", SMALL | options, attention=attention, source=source, rngs=make_rngs(seed)
    )


def draw(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, shape).astype(np.int32)


@functools.cache
def decoded(expression, **options):
    """Logits of a pass over the whole text; of prompts of 40 and 3 tokens and every step after."""
    made = create(expression, LONG, **options)
    graph, weights = nnx.split(made)
    tokens, lengths = jnp.asarray(draw(2, STEPS)), jnp.asarray([PROMPT, 3])

    def call(weights, tokens):
        model = nnx.merge(graph, weights)
        prompts = tokens[:, :PROMPT] * (jnp.arange(PROMPT)[None] < lengths[:, None])
        first, state = model.prefill(prompts, lengths, model.init_state(2))

        def step(state, count):
            at = jnp.minimum(lengths + count, STEPS - 1)
            given = jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
            out, state = model.step(given, state, position=at)
            return state, out

        _, rest = jax.lax.scan(step, state, jnp.arange(STEPS - 3))
        return model(tokens, rngs=None), first, jnp.swapaxes(rest, 0, 1)

    return jax.tree.map(np.asarray, jax.jit(call, compiler_options=support.fast())(weights, tokens))


def check_decoding(expression, **options):
    """Relative to the logits, float32, token by token over the whole text: 1e-4."""
    whole, first, rest = decoded(expression, **options)
    for row, length in enumerate((PROMPT, 3)):
        got = np.concatenate([first[row][None], rest[row, : STEPS - length]])
        expected = whole[row, length - 1 :]
        error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert error.max() <= 1e-4, (length, error.max())


@pytest.mark.parametrize(
    "expression", [e for e in support.FIRSTS if support.able(e) >= {"causal", "padding", "decode"}]
)
def test_256_steps_equal_the_full_pass(expression):
    check_decoding(expression, depth=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "expression", [e for e in support.EXPRESSIONS if support.able(e) >= {"causal", "decode"}]
)
def test_256_steps_equal_the_full_pass_for_every_option(expression):
    check_decoding(expression, width=32, heads=4)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "alibi", "residual": "reversible", "embeddings": "untied"},
        {"positions": "learned", "norm": "post", "norm_type": "layernorm", "logit_cap": 2.0},
        {"positions": "sinusoidal", "mlp": "swiglu"},
        {"positions": "none", "mlp": "relu"},
    ],
    ids=str,
)
def test_decoding_knows_every_option_of_the_model(options):
    check_decoding("softmax(kv_heads=1)", **options)


MIXED = ["softmax", "lsra(kernel=7)", "performer(features=16) + softmax"]


@pytest.mark.parametrize("expression", MIXED)
def test_greedy_generation_is_the_argmax_of_full_passes(expression):
    """Prompts of 9, 1 and 4 tokens in one batch: each is continued as it would be alone.

    What a token's place adds is large here, or an untrained model would tell little of it.
    """
    made = create(expression, embeddings="untied", positions="learned")
    made.place.table[...] = 50 * made.place.table[...]
    lengths, more = np.array([9, 1, 4]), 12
    prompts = draw(3, 9, seed=1) * (np.arange(9) < lengths[:, None])
    found = np.asarray(generate(made, jnp.asarray(prompts), jnp.asarray(lengths), max_tokens=more))
    text = np.zeros((3, 24), np.int32)
    text[:, :9] = prompts
    graph, weights = nnx.split(made)
    full = jax.jit(lambda w, x: nnx.merge(graph, w)(x, rngs=None), compiler_options=support.fast())
    for count in range(more):
        here = lengths + count - 1
        told = np.asarray(full(weights, jnp.asarray(text)))[np.arange(3), here]
        best = 1 + np.argmax(told[:, 1:], axis=-1)
        np.testing.assert_array_equal(found[:, count], best)
        text[np.arange(3), here + 1] = best
    assert all(len(np.unique(row)) > 4 for row in found)
    if expression == "softmax":
        for row, length in enumerate(lengths):
            alone = generate(
                made, jnp.asarray(prompts[row : row + 1, :length]), jnp.asarray([length]),
                max_tokens=more,
            )  # fmt: skip
            np.testing.assert_array_equal(alone[0], found[row])


def test_a_row_ends_at_its_stop_token_and_sampling_follows_the_key():
    made = create()
    given = jnp.asarray(draw(8, 5)), jnp.full(8, 5)
    sample = functools.partial(generate, made, *given, max_tokens=15, sampling=Sampling(top_p=0.95))
    one, again, other = (np.asarray(sample(key=jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and (one > 0).all()
    stopped = np.asarray(sample(key=jax.random.key(0), stop=5))
    for row, whole in zip(stopped, one, strict=True):
        end = np.flatnonzero(whole == 5)[:1] + 1
        end = end[0] if len(end) else 15
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == 0).all()
    assert (one == 5).any()


def test_the_state_of_a_recurrence_does_not_grow_with_the_model_s_length():
    held = {}
    for expression in ("softmax", "performer(features=16)"):
        for length in (64, 128):
            made = nnx.eval_shape(
                lambda e=expression, n=length: create(e, replace(TEXT, shape=(n,)))
            )
            state = jax.eval_shape(lambda made=made: made.init_state(1))
            held[expression, length] = sum(x.size * 4 for x in jax.tree.leaves(state))
    assert held["softmax", 128] == 2 * held["softmax", 64] == 2 * 128 * 16 * 2 * 4
    assert held["performer(features=16)", 64] == held["performer(features=16)", 128]


@pytest.mark.parametrize(
    ("expression", "positions"),
    [
        ("softmax", "learned"), ("softmax", "sinusoidal"), ("softmax", "alibi"),
        ("performer(features=16)", "rotary"),  # an estimate: turning both alike changes it
    ],
)  # fmt: skip
def test_packed_documents_are_each_as_if_alone(expression, positions):
    made = create(expression, positions=positions)
    tokens = draw(1, 20)
    tokens[0, 17:] = 0
    segments = np.repeat([1, 2, 3, 0], [5, 8, 4, 3])[None].astype(np.int32)
    places = np.concatenate([np.arange(n) for n in (5, 8, 4, 3)])[None].astype(np.int32)
    packed = {"tokens": tokens, "segments": segments, "positions": places}
    together = logits(made, jax.tree.map(jnp.asarray, packed))
    for start, end in ((0, 5), (5, 13), (13, 17)):
        alone = np.zeros((1, 20), np.int32)
        alone[0, : end - start] = tokens[0, start:end]
        np.testing.assert_allclose(
            together[0, start:end], logits(made, jnp.asarray(alone))[0, : end - start],
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_the_future_and_padding_have_no_influence_and_the_past_has():
    made = create("performer(features=16) + softmax")
    tokens = draw(2, 24)
    before = logits(made, jnp.asarray(tokens))
    later = tokens.copy()
    later[:, 10:] = draw(2, 14, seed=5)
    later[1, 15:] = 0
    after = logits(made, jnp.asarray(later))
    np.testing.assert_array_equal(after[:, :10], before[:, :10])
    assert np.abs(after[:, 10:] - before[:, 10:]).max() > 1e-3
    holes = tokens.copy()
    holes[0, 4:6] = 0
    before = logits(made, jnp.asarray(holes))
    table = made.embed.embedding
    table[...] = table[...].at[0].set(1e2)  # its own score changes as well
    seen = ~np.isin(np.arange(24), [4, 5])
    after = logits(made, jnp.asarray(holes))
    np.testing.assert_array_equal(after[0, seen, 1:], before[0, seen, 1:])
    assert np.abs(after[0, ~seen, 1:] - before[0, ~seen, 1:]).max() > 1e-3


def test_tied_embeddings_are_one_table_and_a_cap_bounds_the_logits():
    tables = lambda made: sum(  # noqa: E731
        leaf.shape == (VOCAB, 16) for leaf in jax.tree.leaves(nnx.state(made, nnx.Param))
    )
    tied, untied = create(), create(embeddings="untied")
    assert (tables(tied), tables(untied)) == (1, 2)
    inputs = batch(TEXT)[0]
    plain, capped = logits(tied, inputs), logits(create(logit_cap=0.5), inputs)
    assert np.abs(plain).max() > 0.5
    np.testing.assert_allclose(capped, 0.5 * np.tanh(plain / 0.5), rtol=1e-5, atol=1e-6)
    # Near unit variance from the first step on, tied or not: the loss begins near ln V. (A tied
    # model begins by telling the token that it reads.)
    for made in (tied, untied):
        assert 0.7 < logits(made, inputs).std() < 1.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": TOKENS}, "reads text to continue, not tokens; use model.name='encoder'"),
        ({"attention": "linformer"}, "linformer does not support causal"),
        ({"attention": "performer", "positions": "alibi"}, "performer does not support alibi"),
        ({"logit_cap": 0.0}, "logit_cap=0.0 must be positive; None turns it off"),
        ({"embeddings": "shared"}, "must be one of 'tied', 'untied', not 'shared'"),
    ],
    ids=str,
)
def test_what_cannot_be_built_says_why(options, message):
    with pytest.raises(UserError, match=message):
        create(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 20}, "a prompt of 5 tokens and max_tokens=20 make more than the 24"),
        ({"max_tokens": 0}, "max_tokens=0 must be positive"),
        ({"sampling": Sampling()}, "temperature=1.0 draws tokens and needs a key"),
        ({"stop": VOCAB}, "stop=11 is not a token id from 1 to 10"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_says_why(options, message):
    given = {"max_tokens": 3, "sampling": GREEDY} | options
    with pytest.raises(UserError, match=message):
        generate(create(), jnp.ones((1, 5), jnp.int32), jnp.array([5]), **given)


@pytest.mark.parametrize(
    ("prompts", "lengths", "message"),
    [
        ([[5, 6, 0]], [0], r"lengths\[0\]=0 is not from 1 to 3; .* padded on the right"),
        ([[5, 6, 0]], [-2], r"lengths\[0\]=-2 is not from 1 to 3"),
        ([[5, 6, 0], [5, 6, 7]], [2, 4], r"lengths\[1\]=4 is not from 1 to 3"),
        ([[5, 6, 7], [0, 5, 6]], [3, 3], r"row 1 has \[0\] among its first 3 tokens.*pad on the"),
        ([[5, VOCAB, 0]], [2], r"row 0 has \[11\] among its first 2 tokens.* from 1 to 10"),
    ],
)
def test_prompts_that_are_no_ids_padded_on_the_right_say_so(prompts, lengths, message):
    given = jnp.asarray(prompts), jnp.asarray(lengths)
    with pytest.raises(UserError, match=message):
        generate(create(), *given, max_tokens=3)


def test_of_prompts_the_shapes_are_looked_at_even_where_they_are_traced():
    check = functools.partial(check_prompts, vocab=VOCAB)
    ones = functools.partial(jnp.ones, dtype=jnp.int32)
    for shapes in (((2, 3), (1,)), ((2, 3), (2, 1)), ((3,), (3,))):
        with pytest.raises(UserError, match=r"give \(B, T\) and \(B,\)"):
            jax.eval_shape(check, *map(ones, shapes))
    assert jax.eval_shape(check, ones((2, 3)), jnp.zeros(2, jnp.int32)) is None


@pytest.mark.parametrize("expression", ["gla", "linear + local(window=4)"])
def test_what_the_length_does_not_bound_goes_on_beyond_it(expression):
    """Prompts and answers as of a model of the same weights that is built for 60."""
    short = create(expression, replace(TEXT, shape=(12,)))
    long = create(expression, replace(TEXT, shape=(60,)))
    for prompt in (5, 30):
        given = jnp.asarray(draw(2, prompt)), jnp.asarray([prompt, 4])
        found, expected = (generate(made, *given, max_tokens=20) for made in (short, long))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("expression", "options"),
    [
        ("softmax", {}), ("cosformer", {}), ("local(window=64)", {}), ("linear + sparse", {}),
        ("linear", {"positions": "learned"}), ("linear", {"positions": "sinusoidal"}),
    ],
)  # fmt: skip
def test_what_the_length_bounds_is_refused_beyond_it(expression, options):
    given = jnp.ones((1, 5), jnp.int32), jnp.asarray([5])
    with pytest.raises(UserError, match="max_tokens=20 make more than the 24"):
        generate(create(expression, **options), *given, max_tokens=20)


def test_the_last_token_is_written_without_a_step_behind_it(monkeypatch):
    turns, step = [], CausalLM.step

    def counted(self, tokens, state, *, position):
        jax.debug.callback(lambda at: turns.append(at.tolist()), position)
        return step(self, tokens, state, position=position)

    monkeypatch.setattr(CausalLM, "step", counted)
    made = create(depth=1, mlp_ratio=2.0)  # compiled by no other test
    for more in (1, 3):
        generate(made, jnp.asarray(draw(1, 5)), jnp.asarray([5]), max_tokens=more)
    jax.effects_barrier()
    assert turns == [[5], [6]]


def test_a_mechanism_that_lacks_what_only_a_use_needs_trains_and_is_refused_there(monkeypatch):
    from efficient_attn.attention import MIXERS

    made = create()
    monkeypatch.setattr(MIXERS["softmax"], "supports", frozenset({"padding", "causal"}))
    assert logits(made, batch(TEXT)[0]).shape == (8, 24, VOCAB)
    with pytest.raises(UserError, match="softmax does not support decode, which generation needs"):
        made.init_state(1)
    ones = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(UserError, match="does not support segments, which a row of packed"):
        made({"tokens": ones, "segments": ones, "positions": ones}, rngs=None)
    with pytest.raises(ValueError, match="25 tokens, but the model was built for 24"):
        made(jnp.ones((1, 25), jnp.int32), rngs=None)
