"""The contract, items 2 and 3: the bound, every bit below it, direction, precision, and the ends of a dtype."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import optclip
from optclip import measures
from optclip.stats import recorded
from tests import oracles
from tests.cases import GRADS, PARAMS, SPIKE
from tests.harness import (
    HALF_ULP,
    assert_bits,
    assert_close,
    cases,
    cast,
    finite,
    halves,
    limit_value,
    run,
    scaled,
    standard_run,
)


def bounds(case, state):
    """The limits of the last step: as recorded, else the fixed limit of the case."""
    found = recorded(state)
    return found[0][1].stats.limits if found else limit_value(case)


def assert_bounded(case, updates, state, slack):
    wide = cast(updates, np.float32)
    for size, limit in oracles.pairs(case.measure(wide), bounds(case, state)):
        assert np.all(np.asarray(size) <= np.asarray(limit) * (1 + slack) + 1e-37), (size, limit)


@cases(loose=lambda loose: loose != {})
def test_the_standard_gradients_are_clipped(case):
    updates, _ = standard_run(case)
    changed = [not np.array_equal(a, b) for u, g in zip(updates, GRADS, strict=True)
               for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(g), strict=True)]  # fmt: skip
    assert any(changed)


@cases(measure=lambda measure: measure is not None)
def test_no_result_is_larger_than_its_limit(case):
    for update, state in zip(*standard_run(case), strict=True):
        assert_bounded(case, update, state, slack=1e-6)


@cases(measure=lambda measure: measure is not None)
def test_in_half_precision_the_limit_holds_to_rounding(case):
    for update, state in zip(*standard_run(case, halves), strict=True):
        assert_bounded(case, update, state, slack=HALF_ULP["bfloat16"] * 1.01)


@cases(loose=lambda loose: loose is not None)
def test_below_the_limit_every_bit_is_kept(case):
    tiny = np.array([1e-40, -1e-45, 1.2e-38, -0.0], np.float32)  # denormals are flushed by arithmetic on some devices
    grads = [{**g, "tiny": tiny, "half": cast(tiny * 1e34, np.float16)} for g in GRADS[:SPIKE]]
    grads = [{**g, "brain": cast(tiny, ml_dtypes.bfloat16)} for g in grads]
    params = {**PARAMS, **{k: np.ones_like(grads[0][k]) for k in ("tiny", "half", "brain")}}
    for update, grad in zip(run(case.make(**case.loose), grads, params)[0], grads, strict=True):
        assert_bits(update, grad)


@cases(limit=lambda name: name not in (None, "percent", "percentile", "rule"))  # a percentile ends at 100
def test_an_infinite_limit_changes_nothing_also_where_all_is_zero(case):
    """Not even with a memory or parameters of zeros, of which no infinite multiple is a number."""
    given = inspect.signature(getattr(optclip, case.public)).parameters
    off = {name: value for name, value in {"patience": None, "eps": 0.0, "wake": False}.items() if name in given}
    if case.public == "stable_adamw_clip":  # divides by eps
        del off["eps"]
    tx = case.make(**{**(case.loose or {}), case.limit: np.inf, **off})
    zero = jax.tree.map(np.zeros_like, PARAMS)

    @jax.jit
    def step(grads, state):
        update = lambda grads: tx.update(grads, state, zero)
        return update(grads), jax.grad(lambda grads: optax.tree.sum(update(grads)[0]))(grads)

    state = tx.init(zero)
    for grads in [zero] * 4 + GRADS[:2]:
        (update, state), slope = step(jax.tree.map(jnp.asarray, grads), state)
        assert_bits(update, grads)
        assert_close(slope, jax.tree.map(np.ones_like, grads), rtol=1e-6)


@cases(keeps_direction=True)
def test_the_direction_is_kept_in_each_scope(case):
    for update, grad in zip(standard_run(case)[0], GRADS, strict=True):
        assert_close(update, oracles.same_direction(update, grad, case.scope), rtol=2e-6)


@cases(wrapper=False)
def test_float32_agrees_with_float64_and_half_precision_rounds_once(case):
    """The same numbers in float64: an oracle for precision; what a method should compute is tested in its own file."""
    tx = case.make()
    with jax.enable_x64(True):
        update = jax.jit(tx.update)  # one program for both
    for dtypes in (lambda tree: tree, halves):
        got = standard_run(case, *(() if dtypes is not halves else (halves,)))[0]
        params = cast(dtypes(PARAMS), np.float64)
        with jax.enable_x64(True):
            state = tx.init(params)
            for step, grad in enumerate(map(dtypes, GRADS)):
                want, state = update(cast(grad, np.float64), state, params)
                assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(want))
                for a, b in zip(jax.tree.leaves(got[step]), jax.tree.leaves(want), strict=True):
                    ulp = HALF_ULP[a.dtype.name] if dtypes is halves else 0
                    assert_close(a, b, rtol=1e-6 + 1.01 * ulp, atol=1e-7 * ulp, where=f"{a.dtype} in step {step}")


@cases(history=False, wrapper=False)
def test_the_ends_of_float32_are_measured_right(case):
    huge, tiny, far = scaled(GRADS[0], 1e20), scaled(GRADS[1], 1e-25), scaled(GRADS[2], 1e36)
    mixed = {"dense": scaled(GRADS[3]["dense"], 1e20), "head": scaled(GRADS[4]["head"], 1e-25)}
    value = limit_value(case)
    rows = [(value, huge), (value, far), (value, mixed), (value * 1e-25, tiny), (value * 1e-25, GRADS[0])]

    def steps(dtype):
        @jax.jit
        def once(limit, grad, params):
            tx = case.make(**{case.limit: limit})
            return tx.update(grad, tx.init(params), params)[0]

        return [once(np.asarray(limit, dtype), cast(grad, dtype), cast(PARAMS, dtype)) for limit, grad in rows]

    got = steps(np.float32)
    with jax.enable_x64(True):
        want = steps(np.float64)
    for row, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, rtol=1e-6, atol=1e-37, where=f"row {row}: ")


@cases(history=True)
def test_the_ends_of_float32_do_not_harm_the_memory(case):
    grads = [*GRADS[:4], scaled(GRADS[0], 1e20), scaled(GRADS[1], 1e-25), *GRADS[4:6]]
    updates, states = run(case.make(), grads)
    assert all(map(finite, updates))
    for _, state in recorded(states):
        assert all(np.all(np.asarray(limit) > 0) for limit in jax.tree.leaves(state.stats.limits))


@pytest.mark.parametrize("measure", ["global_norm", "leaf_norm", "leaf_rms", "unit_norm", "magnitude"])
@pytest.mark.parametrize("dtype, n, value", [
    (np.float16, 1, 300.0), (ml_dtypes.bfloat16, 30, 1.0), (np.float32, 3, 1e20), (np.float32, 3, 1e-25),
    (np.float32, 2, 2.0**-140), (np.float16, 2, 6e-8),
])  # fmt: skip
def test_measures_are_right_in_every_dtype(measure, dtype, n, value):
    tree = {str(i): np.full((4, 2), value * (1 + i % 3), np.float32).astype(dtype) for i in range(n)}
    got = jax.jit(getattr(measures, measure))(tree)
    want = oracles.MEASURES[measure](tree)
    floor = 1e-37 if value < 1e-37 else 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2e-6, atol=floor)


def test_a_bfloat16_tree_of_a_thousand_leaves_is_measured_right():
    tree = [np.full(16, 1 + i % 3, ml_dtypes.bfloat16) for i in range(1000)]
    np.testing.assert_allclose(measures.global_norm(tree), oracles.global_norm(tree), rtol=2e-6)


_floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1e-25, 1e20, -3e38])
_arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3), elements=_floats)


@settings(max_examples=40, deadline=None)
@given(tree=st.lists(_arrays, max_size=3), ord=st.sampled_from([1, 2, 3.5, np.inf, 0.5]))
def test_norms_of_any_tree_and_order(tree, ord):
    for name in ("global_norm", "leaf_norm", "unit_norm"):
        got, want = getattr(measures, name)(tree, ord=ord), oracles.MEASURES[name](tree, ord=ord)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            b = np.where(b > np.finfo(np.float32).max, np.inf, b)
            np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2e-5, atol=1e-37)
