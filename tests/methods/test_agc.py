"""AGC, against the paper's equation (3) in float64 and against Optax."""

import jax
import numpy as np
import optax
import pytest

import optclip
from tests import oracles
from tests.harness import assert_bits, assert_close
from tests.methods.test_norm import ulps

SHAPES = {"bias": (5,), "dense": (6, 4), "heads": (6, 2, 3), "conv": (3, 3, 2, 4), "row": (1, 7), "scale": ()}
RNG = np.random.default_rng(7)
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
GRADS = {name: RNG.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def apply(tx, grads=GRADS, params=PARAMS):
    return tx.update(grads, tx.init(params), params)[0]


def equation_3(grad, weight, clipping, eps, axis):
    size = np.sqrt(np.sum(np.square(grad, dtype=np.float64), axis=axis, keepdims=True))
    limit = clipping * np.maximum(np.sqrt(np.sum(np.square(weight, dtype=np.float64), axis=axis, keepdims=True)), eps)
    return np.where(size > limit, grad * limit / np.where(size > 0, size, 1), grad)


@pytest.mark.parametrize(("clipping", "eps"), [(0.01, 1e-3), (0.2, 1e-3), (0.2, 5.0)])
def test_units_of_every_rank(clipping, eps):
    axes = {"bias": (0,), "dense": (0,), "heads": (0,), "conv": (0, 1, 2), "row": (0, 1), "scale": ()}
    want = {k: equation_3(GRADS[k], PARAMS[k], clipping, eps, axes[k]) for k in SHAPES}
    assert_close(apply(optclip.adaptive_grad_clip(clipping, eps)), want, rtol=1e-6)


@pytest.mark.parametrize("clipping", [0.01, 0.2, 100.0])
def test_agrees_with_optax(clipping):
    got, want = apply(optclip.adaptive_grad_clip(clipping)), apply(optax.adaptive_grad_clip(clipping))
    most = 3 if jax.devices()[0].platform == "cpu" else 6  # a GPU rounds roots and quotients less well
    assert ulps(got, want) <= most
    if clipping == 100.0:
        assert_bits(jax.tree.map(np.asarray, got), GRADS)


def test_axes_can_be_chosen_for_each_leaf():
    got = apply(optclip.adaptive_grad_clip(0.1, axis={**dict.fromkeys(SHAPES), "heads": (0, 1), "dense": 1}))
    np.testing.assert_allclose(got["heads"], equation_3(GRADS["heads"], PARAMS["heads"], 0.1, 1e-3, (0, 1)), rtol=2e-6)
    np.testing.assert_allclose(got["dense"], equation_3(GRADS["dense"], PARAMS["dense"], 0.1, 1e-3, 1), rtol=2e-6)
    np.testing.assert_allclose(got["conv"], equation_3(GRADS["conv"], PARAMS["conv"], 0.1, 1e-3, (0, 1, 2)), rtol=2e-6)


def test_layers_of_a_stack_have_units_of_their_own():
    grads = np.stack([GRADS["dense"], 2 * GRADS["dense"]])
    weights = np.stack([PARAMS["dense"], PARAMS["dense"] / 3])
    got = apply(optclip.adaptive_grad_clip(0.1, stack_axis=0), grads, weights)
    for layer, grad, weight in zip(got, grads, weights, strict=True):
        np.testing.assert_allclose(layer, equation_3(grad, weight, 0.1, 1e-3, 0), rtol=2e-6)


def test_the_head_is_left_out_in_one_line():
    tx = optax.masked(optclip.adaptive_grad_clip(0.01), {**dict.fromkeys(SHAPES, True), "dense": False})
    got = apply(tx)
    assert_bits(np.asarray(got["dense"]), GRADS["dense"])
    assert oracles.norm(got["bias"]) < oracles.norm(GRADS["bias"])


def test_parameters_that_are_zero_can_move_and_with_no_floor_cannot():
    zero = jax.tree.map(np.zeros_like, PARAMS)
    moved = apply(optclip.adaptive_grad_clip(0.1), params=zero)
    np.testing.assert_allclose(oracles.norm(moved["bias"]), 0.1 * 1e-3, rtol=1e-6)
    still = apply(optclip.adaptive_grad_clip(0.1, eps=0.0), params=zero)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(still))


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"clipping": 0.0}, r"adaptive_grad_clip\(clipping=0.0\): clipping must be > 0"),
    ({"clipping": None}, r"adaptive_grad_clip\(clipping=None\): clipping must be > 0"),
    ({"clipping": 0.1, "eps": -1.0}, r"adaptive_grad_clip\(eps=-1.0\): eps must be finite and >= 0"),
])  # fmt: skip
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optclip.adaptive_grad_clip(**kwargs)
