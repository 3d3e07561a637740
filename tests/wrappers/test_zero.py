"""zero_nonfinite: elements that are not finite become zero, and are counted by kind."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import optclip
from optclip import zero_nonfinite
from tests.meshes import devices

VALUES = [np.nan, np.inf, -np.inf, 1.5, -2.0, 0.0]
update = jax.jit(zero_nonfinite().update)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from(VALUES), min_size=8, max_size=8), min_size=1, max_size=3))
def test_against_numpy(rows):
    tx = zero_nonfinite()
    state = tx.init({})
    for row in np.asarray(rows):
        dtypes = {"a": jnp.float16, "b": jnp.bfloat16, "c": jnp.float32}
        g = {k: jnp.asarray(part, dtypes[k]) for k, part in zip("abc", np.split(row, [3, 6]), strict=True)}
        out, state = update(g, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(out, g)
        flat = np.concatenate([np.asarray(out[k], np.float64) for k in "abc"])
        np.testing.assert_array_equal(flat, np.where(np.isfinite(row), row, 0))
    seen = np.asarray(rows)
    wanted = [np.isnan(seen).sum(), np.isposinf(seen).sum(), np.isneginf(seen).sum(), (~np.isfinite(seen[-1])).sum()]
    assert [int(n) for n in state] == wanted
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init({}))


def test_complex_integers_and_float0():
    parts = jnp.array([1, jnp.nan, 1, jnp.inf]), jnp.array([1, jnp.inf, -jnp.inf, -jnp.inf])
    g = {"c": jax.lax.complex(*parts), "n": jnp.arange(2),
         "f": np.zeros(2, jax.dtypes.float0), "none": None}  # fmt: skip
    out, state = zero_nonfinite().update(g, zero_nonfinite().init(g))
    assert out["c"].tolist() == [1 + 1j, 0, 0, 0] and out["n"].tolist() == [0, 1] and out["f"] is g["f"]
    assert [int(n) for n in state] == [1, 1, 1, 3]


def test_counts_stop_at_the_largest_integer():
    tx = zero_nonfinite()
    state = tx.init(0)._replace(nan=jnp.int32(2**31 - 2))
    _, state = tx.update(jnp.full(3, jnp.nan), state)
    assert int(state.nan) == 2**31 - 1


@pytest.mark.parametrize("checked", [True, False])
def test_counts_over_a_mesh(checked):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices(2))
    tx = zero_nonfinite(axis_name=None if checked else "data")
    g = jnp.array([jnp.nan, 1.0, jnp.nan, jnp.inf])
    body = jax.shard_map(
        lambda g: tx.update(g, tx.init(g)), mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()), check_vma=checked
    )
    out, state = jax.jit(body)(g)
    assert out.tolist() == [0, 1, 0, 0] and [int(n) for n in state] == [2, 1, 0, 3]


def test_summary():
    tx = zero_nonfinite()
    _, state = tx.update(jnp.array([jnp.nan, -jnp.inf]), tx.init(0))
    said = {k: int(v) for k, v in optclip.summary((state,)).items()}
    assert said == {"zero/nan": 1, "zero/posinf": 0, "zero/neginf": 1, "zero/last": 2}
