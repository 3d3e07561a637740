"""`summary` in loggers: real TensorBoard event files are written by the example and read back; W&B takes the dict."""

import importlib.util
import pathlib

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "loggers.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("loggers_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    """What ``wandb.init()`` returns, as far as an optimizer cares: a dict of scalars per step."""

    def __init__(self):
        self.history = []

    def log(self, data, step=None):
        assert all(isinstance(k, str) and np.ndim(v) == 0 and np.isreal(v) for k, v in data.items())
        self.history.append((step, {k: float(v) for k, v in data.items()}))


def test_event_files_read_back_what_was_logged(example, tmp_path):
    board, run = example.Board(tmp_path), Run()

    def log(scalars, step):
        board.log(scalars, step)
        run.log(scalars, step)

    accuracy = example.train(log, 60)
    board.close()
    assert accuracy > 0.5
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    tags = read.Tags()["scalars"]
    assert {"loss", "clip/preclip_norm", "clip/limit", "clip/scale", "clip/clipped"} <= set(tags)
    for tag in tags:
        got = [(e.step, e.value) for e in read.Scalars(tag)]
        want = [(step, data[tag]) for step, data in run.history if tag in data]
        assert [s for s, _ in got] == [s for s, _ in want]
        np.testing.assert_array_equal([v for _, v in got], np.float32([v for _, v in want]))
    norm, limit, scale = ([data[f"clip/{k}"] for _, data in run.history] for k in ("preclip_norm", "limit", "scale"))
    np.testing.assert_allclose(scale, np.minimum(1, np.divide(limit, norm)), rtol=1e-5)
    assert any(s < 1 for s in scale) and len(read.Scalars("clip/limit")) == 60
