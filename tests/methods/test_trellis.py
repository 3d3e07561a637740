"""TRELLIS's clipper: the percentile of a full window of norms before this one, under a cap."""

import numpy as np
import pytest

import optclip
from tests.methods import norms


def oracle(percent, window, cap):
    history = []

    def step(size):
        limit = min(np.percentile(history[-window:], percent), cap) if len(history) >= window else cap
        history.append(size)
        return limit

    return step


@pytest.mark.parametrize("percent, window, cap", [(95, 50, 2.0), (50, 20, 1.1), (95, 40, np.inf)])
def test_every_step(percent, window, cap):
    tx = optclip.clip_by_percentile(percent, window, cap, patience=None)
    norms.check(tx, oracle(percent, window, cap), norms.eventful(), rtol=1e-5)


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.clip_by_percentile, window=50, max_norm=2.0)


def test_zeros_do_not_hold_a_layer_at_zero():
    idle = np.concatenate([norms.healthy(60), np.zeros(60)])
    make = lambda **kwargs: optclip.clip_by_percentile(50.0, 50, np.inf, **kwargs)
    assert norms.first_pass(make(), idle, 1.0, 60) == 0
    assert norms.first_pass(make(patience=None), idle, 1.0, 60) == 26


def test_a_higher_level_is_accepted_within_a_window():
    tx = optclip.clip_by_percentile(95.0, 50, np.inf)
    assert norms.first_pass(tx, norms.healthy(100), 1000.0, 100) <= 50
