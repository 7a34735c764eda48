"""What is special to Reformer: the hash, its rounds and rotations, what layouts can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import attention
from efficient_attn.attention.reformer import Reformer
from efficient_attn.errors import UserError
from kernels import Mask
from tests import support


def mixer(*, seq=16, positions="none", **options):
    config = Reformer.Config(**options)
    where = support.site(seq=seq, positions=positions)
    return Reformer(config, where, rngs=nnx.Rngs(0), shared={})


def x_of(length=16, seed=0):
    return jnp.asarray(support.draw((2, length, support.WIDTH), seed=seed))


def call(one, x, rngs=None):
    run = jax.jit(
        lambda x: one(x, mask=Mask(), rngs=rngs, shared={}), compiler_options=support.fast()
    )
    return run(x)


def test_the_hash_is_of_the_direction():
    one = mixer(buckets=8, rounds=2)
    q = jnp.asarray(support.draw((2, 16, 4, 8), seed=0))
    buckets = np.asarray(one.hash(q, 2))
    assert buckets.shape == (2, 2, 16, 4) and set(np.unique(buckets)) == set(range(8))
    np.testing.assert_array_equal(one.hash(3.0 * q, 2), buckets)
    np.testing.assert_array_equal(one.hash(-q, 2), (buckets + 4) % 8)
    near = q + 0.05 * jnp.asarray(support.draw(q.shape, seed=1))
    far = jnp.asarray(support.draw(q.shape, seed=2))
    agree = [float(jnp.mean(one.hash(other, 2) == buckets)) for other in (near, far)]
    assert agree[0] > 0.85 and agree[1] < 0.25, agree


def test_a_tuple_of_buckets_hashes_by_each_and_has_their_product():
    both, q = mixer(buckets=(4, 6)), jnp.asarray(support.draw((2, 16, 4, 8), seed=0))
    parts = mixer(buckets=4), mixer(buckets=6)
    parts[0].rotations[...] = both.rotations[...][..., :2]
    parts[1].rotations[...] = both.rotations[...][..., 2:]
    found = [np.asarray(part.hash(q, 4)) for part in parts]
    np.testing.assert_array_equal(both.hash(q, 4), found[0] * 6 + found[1])


def test_rounds_and_heads_have_rotations_of_their_own():
    rotations = mixer(rounds=2, eval_rounds=3, buckets=4).rotations[...]
    assert rotations.shape == (3, 4, 8, 2)
    flat = np.asarray(rotations).reshape(12, -1)
    assert len(np.unique(flat, axis=0)) == 12


@pytest.mark.parametrize(
    ("seq", "chunk", "directions"),
    [(64, 64, 1), (640, 64, 5), (4096, 64, 4 + 4), (2048, 10, 8 + 7)],
)
def test_there_is_a_bucket_for_each_chunk_unless_given(seq, chunk, directions):
    """2, then 10, are hashed at once; 64 are 8 x 8; 206 are 16 x 14 with a few to spare."""
    assert mixer(seq=seq, chunk=chunk).rotations[...].shape[-1] == directions


def test_evaluation_may_hash_more_often_than_training():
    one, x = mixer(rounds=1, eval_rounds=4, buckets=4, chunk=4), x_of()
    alone = mixer(rounds=1, buckets=4, chunk=4)
    for name in ("query", "value", "out"):
        setattr(alone, name, getattr(one, name))
    alone.rotations[...] = one.rotations[...][:1]
    training = call(one, x, nnx.Rngs(dropout=0))
    np.testing.assert_allclose(training, call(alone, x), rtol=1e-5, atol=1e-6)
    assert np.abs(call(one, x) - training).max() > 1e-2


def test_a_token_without_company_sees_itself():
    one, x = mixer(buckets=2, rounds=2), x_of(1)
    np.testing.assert_allclose(call(one, x), one.out(one.value(x)), rtol=1e-5, atol=1e-6)


def test_rotations_are_redrawn_at_their_turn_and_by_the_step_alone():
    one, again = mixer(redraw=3), mixer(redraw=3)
    first = np.asarray(one.rotations[...])
    for step in range(7):
        one.refresh(jnp.asarray(step))
    again.refresh(jnp.asarray(6))
    np.testing.assert_array_equal(one.rotations[...], again.rotations[...])
    assert np.abs(np.asarray(one.rotations[...]) - first).max() > 0.1
    again.refresh(jnp.asarray(7))
    np.testing.assert_array_equal(one.rotations[...], again.rotations[...])
    still = mixer(redraw=0)
    still.refresh(jnp.asarray(0))
    np.testing.assert_array_equal(still.rotations[...], first)


def test_the_rotations_are_not_trained():
    trained = jax.tree.leaves(nnx.state(mixer(), nnx.Param))
    assert sum(leaf.size for leaf in trained) == 3 * (32 * 32 + 32)


def test_queries_are_not_rounded_before_they_are_hashed():
    """In bfloat16 a tenth of the tokens would change their bucket."""
    x = x_of(64).astype(jnp.bfloat16)
    config, wide = Reformer.Config(buckets=16), x.astype(jnp.float32)
    half = Reformer(config, support.site(seq=64, dtype=jnp.bfloat16), rngs=nnx.Rngs(0), shared={})
    full = Reformer(config, support.site(seq=64), rngs=nnx.Rngs(0), shared={})
    at = jnp.arange(64)[None]
    ours = half.hash(half._project(x, at)[0], 4)
    np.testing.assert_array_equal(ours, full.hash(full._project(wide, at)[0], 4))
    assert half(x, mask=Mask(), shared={}).dtype == jnp.bfloat16


def test_queries_are_hashed_at_full_precision_on_every_device():
    one, x = mixer(), x_of()
    traced = jax.make_jaxpr(lambda x: one.hash(one.query(x).reshape(2, 16, 4, 8), 1))(x)
    said = [eqn.params["precision"] for eqn in traced.eqns if eqn.primitive.name == "dot_general"]
    assert said == [(jax.lax.Precision.HIGHEST,) * 2] * 2


@pytest.mark.parametrize("layout", ["bucket", "sorted"])
def test_a_chunk_longer_than_the_sequence_costs_no_more_than_the_sequence(layout):
    where = support.site(width=64, seq=17)
    short, long = (
        attention.cost(f"reformer(chunk={chunk}, buckets=2, layout={layout!r})", where, 17)
        for chunk in (17, 64)
    )
    assert short == long


@pytest.mark.parametrize("layout", ["bucket", "sorted"])
def test_the_work_does_not_grow_with_the_square_of_the_length(layout):
    """At lengths of the site: with their hashes, which have as many buckets as there are chunks."""
    text = f"reformer(chunk=16, layout={layout!r})"
    costs = [
        attention.cost(text, support.site(seq=t), t).multiply_adds for t in (1024, 4096, 16384)
    ]
    exponent = np.log(costs[2] / costs[0]) / np.log(16)
    assert 0.98 < exponent < 1.1, costs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 3}, "buckets=3 must be even numbers, or 1"),
        ({"buckets": (2, 3)}, r"buckets=\(2, 3\) must be even"),
        ({"buckets": 0}, "buckets=0 must be even"),
        ({"buckets": ()}, r"buckets=\(\) must be even"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"chunk": 0}, "chunk must be at least 1, not 0"),
        ({"redraw": -1}, "redraw must be at least 0, not -1"),
        ({"eval_rounds": 0}, "eval_rounds=0 must be positive, or None"),
    ],
)
def test_a_mistake_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Reformer.Config(**options)


def test_the_sorted_layout_is_refused_where_a_model_is_causal():
    with pytest.raises(UserError, match="does not support causal"):
        attention.build(
            "reformer(layout='sorted')", support.site(), needs={"causal"}, rngs=nnx.Rngs(0)
        )
