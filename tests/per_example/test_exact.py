"""Against ``vmap(grad)``: every norm and the aggregate to 1e-10 in float64, to 1e-5 in float32, at random shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optclip.per_example import clipped_value_and_grad, value_and_norms

from . import oracle, zoo

ROUNDED = {"low_precision": (1e-2, 1e-2), "low_precision_square": (2e-2, 2e-2)}  # the loss itself rounds to bfloat16


def compare(loss, params, batch, tolerance):
    @jax.jit
    def both(params, batch):
        losses, grads = oracle.per_example_gradients(loss, params, batch)
        norms = oracle.norms_of(grads)
        limit = jnp.median(norms)  # about half of the examples are clipped
        wanted = losses, norms, oracle.clipped_mean(grads, limit)
        (mean, seen), got = clipped_value_and_grad(loss, limit)(params, batch)
        return wanted, (mean, seen, got), value_and_norms(loss)(params, batch)

    (losses, norms, grads), (mean, seen, got), (only_losses, only_norms) = both(params, batch)
    assert oracle.distance(seen.norms, norms) <= tolerance
    assert oracle.distance(only_norms, norms) <= tolerance
    np.testing.assert_allclose(seen.norms, norms, rtol=10 * tolerance)
    assert oracle.distance(got, grads) <= tolerance
    assert oracle.distance([mean, seen.losses, only_losses], [jnp.mean(losses), losses, losses]) <= tolerance


@pytest.mark.parametrize("name", zoo.CASES)
def test_float64(name, x64):
    norm_tolerance, _ = ROUNDED.get(name, (1e-10, 1e-10))
    compare(*zoo.build(name, seed=0), norm_tolerance)


@pytest.mark.parametrize(
    "name", ["mlp", "attention", "tied_embedding", "recurrent", "scanned_checkpoints", "convolution"]
)
def test_float32(name):
    compare(*zoo.build(name, seed=1, dtype=jnp.float32), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(seed=st.integers(0, 2**31 - 1))
def test_random_shapes(name, x64, seed):
    norm_tolerance, _ = ROUNDED.get(name, (1e-10, 1e-10))
    compare(*zoo.build(name, seed), norm_tolerance)
