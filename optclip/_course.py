"""The level of the norm over a run of any length, in a few numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optclip._rules import select

STRETCHES = 32


class Course(NamedTuple):
    """The level of the norm over the run, in 32 stretches of equal length; when they are full, each two become one.

    Attributes:
      step: int32, steps seen.
      stride: int32, steps per stretch, a power of two.
      level: float32[32], the mean of log2(norm) over each stretch, of norms that are finite and not zero.
      entered: int32[32], how many those were.
    """

    step: jax.Array
    stride: jax.Array
    level: jax.Array
    entered: jax.Array


def start() -> Course:
    """Before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return Course(zero, zero + 1, jnp.zeros(STRETCHES, jnp.float32), jnp.zeros(STRETCHES, jnp.int32))


def walk(course: Course, norm: jax.Array) -> Course:
    course = select(course.step == STRETCHES * course.stride, _halve(course), course)
    enters = jnp.isfinite(norm) & (norm > 0)
    here = (jnp.arange(STRETCHES, dtype=jnp.int32) == course.step // course.stride) & enters
    count = course.entered + here.astype(jnp.int32)
    gain = (jnp.log2(jnp.where(enters, norm, 1)) - course.level) / jnp.maximum(count, 1).astype(jnp.float32)
    return Course(course.step + 1, course.stride, course.level + jnp.where(here, gain, 0), count)


def _halve(course: Course) -> Course:
    """Each two stretches as one, at twice the stride, which leaves the second half free."""
    even, odd = (Course(course.step, course.stride, course.level[i::2], course.entered[i::2]) for i in (0, 1))
    level = mean(even.level, even.entered, odd.level, odd.entered)
    pad = lambda x: jnp.concatenate([x, jnp.zeros_like(x)])
    return Course(course.step, course.stride * 2, pad(level), pad(even.entered + odd.entered))


def merge(a: Course, b: Course) -> Course:
    stride = jnp.maximum(a.stride, b.stride)
    a, b = (jax.lax.while_loop(lambda c: c.stride < stride, _halve, c) for c in (a, b))
    return Course(
        jnp.maximum(a.step, b.step), stride, mean(a.level, a.entered, b.level, b.entered), a.entered + b.entered
    )


def mean(a: jax.Array, weight_a: jax.Array, b: jax.Array, weight_b: jax.Array) -> jax.Array:
    weight_a, weight_b = weight_a.astype(a.dtype), weight_b.astype(b.dtype)
    return (a * weight_a + b * weight_b) / jnp.maximum(weight_a + weight_b, 1)
