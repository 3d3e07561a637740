"""Four host devices for the tests (``JAX_PLATFORMS=cuda,cpu``: a GPU), and the names that docstrings use."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import optax
import pytest

import optclip

if jax.default_backend() != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")  # else products keep 10 bits of their factors


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update({k: getattr(optclip, k) for k in optclip.__all__})
    for shelf in (optclip.measures, optclip.thresholds, optclip.responses):
        doctest_namespace.update({k: getattr(shelf, k) for k in shelf.__all__})
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, optclip=optclip)
