"""Update clipping by root mean square, against float64 and against Optax."""

import jax
import numpy as np
import optax
import pytest

import optclip
from tests import oracles
from tests.cases import GRADS
from tests.harness import assert_bits, assert_close
from tests.methods.test_norm import apply, ulps


@pytest.mark.parametrize("grads", GRADS)
def test_each_leaf_is_divided_by_its_excess(grads):
    want = jax.tree.map(lambda g: g / max(1.0, np.sqrt(np.mean(np.square(g, dtype=np.float64))) / 0.25), grads)
    assert_close(apply(optclip.clip_by_block_rms(0.25), grads), want, rtol=1e-6)
    assert ulps(apply(optclip.clip_by_block_rms(0.25), grads), apply(optax.clip_by_block_rms(0.25), grads)) <= 3


def test_below_the_threshold_every_bit_is_kept_as_optax_keeps_it():
    got = jax.tree.map(np.asarray, apply(optclip.clip_by_block_rms(100.0), GRADS[0]))
    assert_bits(got, GRADS[0])


def test_layers_of_a_stack_are_blocks_of_their_own():
    stack = np.stack([GRADS[0]["dense"]["kernel"], 0.1 * GRADS[1]["dense"]["kernel"]])
    got = apply(optclip.clip_by_block_rms(0.2, stack_axis=0), stack)
    for layer, grad in zip(got, stack, strict=True):
        np.testing.assert_allclose(layer, oracles.rescale(grad, oracles.leaf_rms(grad), 0.2), rtol=1e-6)


@pytest.mark.parametrize("value", [0, -1.0, np.nan, None])
def test_bad_thresholds_are_refused(value):
    with pytest.raises(ValueError, match=r"clip_by_block_rms\(threshold=.*\): threshold must be > 0"):
        optclip.clip_by_block_rms(value)
