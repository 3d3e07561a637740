"""What programs for a GPU cost: sums in the program that its compiler is given and, where there is one, kernels."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optclip
from tests.meshes import devices
from tests.test_cost import compiled, gpt2, size, small

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="kernels of XLA:GPU")
CLIPPERS = {
    "global": (optclip.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)),
    "largest": (optclip.clip_by_global_norm(1.0, jnp.inf), optax.clip_by_global_norm(1.0)),
    "leaf": (optclip.clip_by_leaf_norm(1.0), optax.clip_by_global_norm(1.0)),
    "units": (optclip.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01)),
    "adagc": (optclip.adagc(), optax.clip_by_global_norm(1.0)),
}


def sums(tx: Any, tree: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Reductions over arrays in the program for a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    traced = jax.jit(tx.update).trace(tree, jax.eval_shape(tx.init, tree), tree)
    return len(re.findall(r"stablehlo\.reduce(_window)?\b", traced.lower(lowering_platforms=("cuda",)).as_text()))


@pytest.mark.parametrize(("name", "most"), [("global", 8), ("largest", 60), ("leaf", 65), ("units", 135)])
def test_sums(name: str, most: int, monkeypatch: pytest.MonkeyPatch):
    """GPT-2 has 50 large leaves of 6 shapes and 98 small ones; units are measured of gradients and of parameters.

    The global norm has a sum for each shape, the others one for each large leaf.
    """
    assert sums(CLIPPERS[name][0], gpt2(), monkeypatch) <= most


def test_small_leaves_are_summed_together(monkeypatch: pytest.MonkeyPatch):
    assert sums(optclip.clip_by_global_norm(1.0), small(1000), monkeypatch) <= 3
    assert sums(optclip.clip_by_leaf_norm(1.0), small(1000), monkeypatch) <= 30


def test_leaves_of_one_shape_that_are_sharded_apart_do_not_move(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices(4))
    halves = [jax.NamedSharding(mesh, spec) for spec in (jax.P(None, "m"), jax.P("m", None))]
    tree = [jax.ShapeDtypeStruct((768, 768), jnp.float32)] * 2
    program = jax.jit(optclip.global_norm, in_shardings=(halves,)).lower(tree).compile()
    moved = re.findall(r"= (.*) (?:all-|collective-)[\w-]+\(", program.as_text())
    shapes = [shape for result in moved for shape in re.findall(r"f32\[([\d,]+)", result)]
    assert shapes and max(math.prod(map(int, shape.split(","))) for shape in shapes) <= 4 * 768


@on_gpu
@pytest.mark.parametrize(("tx", "peer"), CLIPPERS.values(), ids=CLIPPERS)
def test_a_fraction_of_the_kernels_of_optax(tx: Any, peer: Any):
    ours, theirs = (compiled(t, gpt2(), donate=(0, 1)).as_text().count(" fusion(") for t in (tx, peer))
    assert ours < 0.25 * theirs


@on_gpu
@pytest.mark.parametrize("name", CLIPPERS)
def test_no_gradient_is_stored(name: str):
    assert compiled(CLIPPERS[name][0], gpt2(), donate=(0, 1)).memory_analysis().temp_size_in_bytes < 0.1 * size(gpt2())
