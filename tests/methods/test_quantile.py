"""The adaptive quantile of Andrew et al., on the norm of the step."""

import numpy as np
import pytest

import optclip
from tests.methods import norms


def oracle(quantile, rate, ratio):
    state = {}

    def step(size):
        if "c" not in state:
            state["c"] = size
            return np.inf
        limit = ratio * state["c"]
        state["c"] *= np.exp(-rate * (float(size <= state["c"]) - quantile))
        return limit

    return step


@pytest.mark.parametrize("quantile, rate, ratio", [(0.5, 0.2, 1.0), (0.9, 0.05, 1.0), (0.5, 0.1, 2.0)])
def test_every_step(quantile, rate, ratio):
    tx = optclip.clip_by_quantile(quantile, rate, ratio=ratio, patience=None)
    norms.check(tx, oracle(quantile, rate, ratio), norms.eventful(), rtol=1e-4)


def test_it_finds_the_quantile():
    sizes = np.exp(np.random.default_rng(0).normal(size=4000)).astype(np.float32)
    _, limits, _ = norms.run(optclip.clip_by_quantile(0.9, 0.02), sizes)
    assert abs(np.mean(sizes[500:] <= limits[500:]) - 0.9) < 0.01


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.clip_by_quantile)


def test_a_higher_level_is_accepted():
    before = norms.healthy(200)
    for level, paper in ((10.0, 24), (1e12, 277)):
        assert norms.first_pass(optclip.clip_by_quantile(), before, level, 400) <= 50
        assert abs(norms.first_pass(optclip.clip_by_quantile(patience=None), before, level, 400) - paper) < 10
