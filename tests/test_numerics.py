"""Sizes at the edge of float32: neither a square nor the reciprocal of the largest element may leave its range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optclip import measures

EDGES = [3.3e38, 2e38, 1e30, 1e-30, 4e-38]


@pytest.mark.parametrize("ord", [1, 2, 3.0])
@pytest.mark.parametrize("edge", EDGES)
def test_one_element_at_the_edge(edge, ord):
    """In a long leaf, so that the compiler divides a vector by a scalar."""
    tree = {"w": jnp.zeros(1000).at[3].set(edge), "b": jnp.zeros((2, 3))}
    norm, slope = jax.jit(jax.value_and_grad(lambda t: measures.global_norm(t, ord)))(tree)
    np.testing.assert_allclose(norm, np.float32(edge), rtol=1e-6)
    np.testing.assert_allclose(slope["w"][3], 1.0, rtol=1e-5)


@pytest.mark.parametrize("edge", EDGES)
def test_units_and_leaves_at_the_edge(edge):
    w = jnp.zeros((300, 4)).at[7].set(edge)
    np.testing.assert_allclose(jax.jit(measures.unit_norm)({"w": w})["w"], np.full((1, 4), edge, np.float32), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(measures.leaf_rms)({"w": w[:, 0]})["w"], edge / 300**0.5, rtol=1e-6, atol=1e-38)
