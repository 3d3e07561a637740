"""Value clipping, against float64 and against Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import optclip
from tests.cases import GRADS, PARAMS
from tests.harness import assert_bits


def apply(tx, grads):
    return jax.tree.map(np.asarray, tx.update(grads, tx.init(grads))[0])


_array = hnp.arrays(np.float32, 5, elements=st.floats(width=32))


@settings(max_examples=60, deadline=None)
@given(grad=_array, bound=st.floats(2.0**-10, 2.0**10, width=32))
def test_every_component_is_clamped_and_the_others_keep_every_bit(grad, bound):
    got = apply(optclip.clip(bound), grad)
    bound = np.float32(bound)
    assert_bits(got, np.where(np.isnan(grad), grad, np.minimum(np.maximum(grad, -bound), bound)))


@pytest.mark.parametrize("grads", GRADS[:3])
def test_agrees_with_optax_to_the_bit(grads):
    assert_bits(apply(optclip.clip(0.2), grads), apply(optax.clip(0.2), grads))


def test_two_bounds_and_a_side_without_one():
    grad = np.array([-3.0, -0.5, 0.0, 0.5, 3.0, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(apply(optclip.clip(lower=-1.0, upper=2.0), grad), [-1, -0.5, 0, 0.5, 2, 2, -1])
    one_sided = apply(optclip.clip(lower=-np.inf, upper=2.0), grad)
    np.testing.assert_array_equal(one_sided, [-3, -0.5, 0, 0.5, 2, 2, -np.inf])


def test_a_bound_per_group_and_a_schedule():
    tx = optclip.clip({"dense": 0.1, "head": lambda count: 0.2 + 0.1 * count})
    state = tx.init(PARAMS)
    for step in range(3):
        got, state = tx.update(GRADS[step], state)
        for name, bound in (("dense", 0.1), ("head", 0.2 + 0.1 * step)):
            want = jax.tree.map(lambda g, b=bound: np.clip(g, -b, b), GRADS[step][name])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got[name], want)


def test_the_derivative_is_one_within_and_zero_beyond():
    tx = optclip.clip(1.0)
    slope = jax.grad(lambda g: jnp.sum(tx.update(g, tx.init(g))[0]))(jnp.array([0.5, 1.0, -1.0, 2.0, -3.0]))
    np.testing.assert_array_equal(slope, [1, 1, 1, 0, 0])


@pytest.mark.parametrize(("kwargs", "message"), [
    ({}, "give either max_delta, or lower and upper"),
    ({"max_delta": 1.0, "lower": -1.0, "upper": 1.0}, "give either max_delta, or lower and upper"),
    ({"lower": -1.0}, "lower and upper go together"),
    ({"max_delta": 0.0}, r"clip\(max_delta=0.0\): max_delta must be > 0"),
    ({"max_delta": -1.0}, r"clip\(max_delta=-1.0\): max_delta must be > 0"),
    ({"max_delta": float("nan")}, r"clip\(max_delta=nan\): max_delta must be > 0"),
    ({"lower": 0.5, "upper": 1.0}, r"clip\(lower=0.5\): lower must be <= 0, so that a zero gradient stays zero"),
    ({"lower": -1.0, "upper": -0.5}, r"clip\(upper=-0.5\): upper must be >= 0"),
])  # fmt: skip
def test_bad_bounds_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optclip.clip(**kwargs)
