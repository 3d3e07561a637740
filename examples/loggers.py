"""How do clipping statistics get into TensorBoard, or any logger that takes a dict of numbers?

`optclip.summary(opt_state)` is a flat dict of scalars. A small network learns scikit-learn's digits under ZClip; every
step the dict goes to TensorBoard's own event writer (TensorFlow is not needed), and the norm of every tenth step per
layer too. Weights & Biases takes the same dict as it is: ``run.log(optclip.summary(opt_state))``.

Typical answer: 11 curves in out/tensorboard; ZClip clips 3 steps of 400, and the test accuracy is 0.99.

    python examples/loggers.py               # ten seconds; then: tensorboard --logdir out/tensorboard
"""

import argparse
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import optclip


class Board:
    """A logger with the one method that loggers share: ``log(dict_of_scalars, step)``."""

    def __init__(self, folder: pathlib.Path):
        self._writer = EventFileWriter(str(folder))

    def log(self, scalars: Mapping[str, Any], step: int) -> None:
        values = [Summary.Value(tag=tag, simple_value=float(x)) for tag, x in scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def load(seed: int) -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    return (data.data[order] / 16).astype(np.float32), data.target[order]


def loss_fn(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return {"loss": loss, **optclip.summary(optimizer.opt_state)}  # inside jit: nothing extra crosses to the host


def train(log: Any, steps: int, seed: int = 0) -> float:
    """Trains, calls ``log(dict, step)`` every step, and returns the accuracy on 297 test digits."""
    x, y = load(seed)
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs))
    tx = optax.chain(optclip.observe(), optclip.zclip(), optax.adam(2e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        rows = rng.integers(0, 1500, 64)
        scalars = train_step(model, optimizer, x[rows], y[rows])
        if step % 10 == 0:
            parts = optclip.advise(optimizer.opt_state).parts
            scalars |= {f"share of the norm/{part.name}": part.share for part in parts}
        log(scalars, step)
    return float(jnp.mean(jnp.argmax(model(x[1500:]), -1) == y[1500:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/tensorboard"))
    args = parser.parse_args()
    board = Board(args.out)
    accuracy = train(board.log, args.steps)
    board.close()
    print(f"test accuracy {accuracy:.3f}; look at it with: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
