"""icefall's clipping scale: twice the median of a hundred norms, drawn every hundred steps and early on."""

import numpy as np
import pytest

import optclip
from tests.methods import norms


def oracle(scale, period):
    """Steps count from 0, and the norm of step 0 is not stored."""
    stored = {}
    state = {"step": 0, "threshold": np.inf}

    def step(size):
        t = state["step"]
        state["step"] += 1
        if t == 0:
            return np.inf
        stored[t % period] = size
        early = t in (10, 20, 40) and t < period
        if early or t % period == 0:
            values = sorted(stored.values())
            state["threshold"] = scale * values[2 * (len(values) // 4)] * (2 if early else 1)
        return state["threshold"]

    return step


@pytest.mark.parametrize("scale, period", [(2.0, 100), (1.2, 30), (1.5, 7), (3.0, 101)])
def test_every_step(scale, period):
    norms.check(optclip.clip_by_median(scale, period, patience=None), oracle(scale, period), norms.eventful())


def test_the_mend_leaves_a_healthy_run_alone():
    norms.check_healthy(optclip.clip_by_median)


def test_a_higher_level_is_accepted_within_a_window_and_a_half():
    for lead in (201, 251, 260):
        assert norms.first_pass(optclip.clip_by_median(), norms.healthy(lead), 10.0, 200) <= 150


def test_zeros_do_not_hold_a_layer_at_zero():
    idle = np.concatenate([norms.healthy(110), np.zeros(300)])
    assert norms.first_pass(optclip.clip_by_median(), idle, 1.0, 200) == 0
    assert norms.first_pass(optclip.clip_by_median(patience=None), idle, 1.0, 200) > 50
