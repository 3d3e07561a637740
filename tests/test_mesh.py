"""Every public transformation gives the numbers of one device on any mesh, and every way to run on one."""

import inspect
from functools import cache, partial
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

import optclip
from optclip import measures
from tests import meshes
from tests.cases import CASES, SPIKE, STEPS, Case
from tests.harness import row

PARAMS = meshes.draw(100)
GRADS = [meshes.draw(step, 9.0 if step == SPIKE else 0.3) for step in range(STEPS)]
STACKED = jax.tree.map(lambda *x: np.stack(x), *GRADS)


def usual_measure(case: Case) -> Any:
    """What a method takes for ``measure=None``."""
    odd = {"clippy": partial(measures.leaf_norm, ord=np.inf), "stable_adamw_clip": measures.leaf_rms}
    return odd.get(case.public, measures.global_norm if case.scope == "tree" else measures.leaf_norm)


def make(case: Case, axis_name: Any = None, units: Any = None) -> optax.GradientTransformationExtraArgs:
    """The transformation, told over which axes to sum as its users would: ``axis_name=``, else in its measure."""
    unit_wise = case.scope == "unit"
    axis_name = units if unit_wise else axis_name
    if axis_name is None:
        return case.make()
    takes = inspect.signature(getattr(optclip, case.public)).parameters
    changed: dict[str, Any] = {}
    if case.wrapper and jax.tree.leaves(case.kwargs["inner"].init({})):  # the clipper of the row, not the identity
        changed["inner"] = optclip.clip_by_global_norm(0.5, axis_name=axis_name)
    if "axis_name" in takes and case.public != "skip_nonfinite":  # whose devices decide together without being told
        changed["axis_name"] = axis_name
    elif "measure" in takes:
        changed["measure"] = partial(case.kwargs.get("measure", usual_measure(case)), axis_name=axis_name)
    return case.make(**changed)


@cache
def alone(name: str) -> Any:
    case = next(c for c in CASES if c.name == name)
    return jax.jit(partial(meshes.run_steps, make(case)))(PARAMS, STACKED)


def ways() -> list[Any]:
    """Every case in every way; one way for each case by turns, the others in the slow run."""
    return [
        row(case, way, ordinary=(i + j) % len(meshes.WAYS) == 0, id=f"{case.name}-{way}")
        for i, case in enumerate(CASES)
        for j, way in enumerate(meshes.WAYS)
    ]


@pytest.mark.parametrize(("case", "way"), ways())
def test_the_numbers_of_one_device(case: Case, way: str):
    on, whole, units = meshes.WAYS[way]
    updates, numbers = on(partial(meshes.run_steps, make(case, whole, units)), PARAMS, STACKED)
    expected, expected_numbers = alone(case.name)
    chex.assert_trees_all_close(updates, expected, rtol=2e-6, atol=1e-7)
    chex.assert_trees_all_close(numbers, expected_numbers, rtol=2e-6, atol=1e-7)
