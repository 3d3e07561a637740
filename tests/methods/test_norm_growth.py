"""The norm-growth limiter against float64, and its way out of a single tiny update."""

import numpy as np
import pytest

import optclip
from tests.methods import gradients, norms


def oracle(ratio):
    last = None

    def step(g):
        nonlocal last
        n = np.linalg.norm(g)
        limit = np.inf if last is None else ratio * last
        last = min(n, limit)
        return gradients.shrink(g, n, limit)

    return step


@pytest.mark.parametrize("ratio", [1.01, 1.3])
def test_every_step(ratio):
    grads = gradients.eventful()
    grads["b"] = grads["b"] + (grads["b"] == 0)  # the first zero would hold the paper's rule at zero for good
    tx = optclip.norm_growth_limiter(ratio, patience=None)
    gradients.check(tx, gradients.by_leaf(lambda: oracle(ratio)), grads)


def test_the_mend_leaves_a_healthy_run_alone():
    gradients.check_healthy(optclip.norm_growth_limiter)
    norms.check_healthy(optclip.norm_growth_limiter, norms.healthy(1000))


def test_zeros_are_not_remembered():
    idle = np.concatenate([np.full(5, 1.0), np.zeros(20)])
    assert norms.first_pass(optclip.norm_growth_limiter(), idle, 1.0, 100) == 0
    assert norms.first_pass(optclip.norm_growth_limiter(patience=None), idle, 1.0, 100) == 100
    assert norms.first_pass(optclip.norm_growth_limiter(), np.zeros(20), 7.0, 10) == 0


def test_a_tiny_update_and_a_new_level():
    before = norms.healthy(100)
    tiny = np.append(before, 1e-12)
    for sizes, level in ((tiny, 1.0), (before, 100.0)):
        assert norms.first_pass(optclip.norm_growth_limiter(), sizes, level, 200) == 49
        assert norms.first_pass(optclip.norm_growth_limiter(patience=None), sizes, level, 200) == 200
    assert norms.first_pass(optclip.norm_growth_limiter(), np.full(9, 1.0), 3.9, 200) == 136  # climbed to, as the paper
