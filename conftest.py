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


@pytest.fixture(autouse=True, scope="session")
def _compiled_once(tmp_path_factory):
    """Equal programs of different tests are compiled once, by whichever worker is first: a fifth of the time."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    jax.config.update("jax_compilation_cache_dir", str(shared / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace.update({k: getattr(optclip, k) for k in optclip.__all__})
    for shelf in (optclip.measures, optclip.thresholds, optclip.responses):
        doctest_namespace.update({k: getattr(shelf, k) for k in shelf.__all__})
    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, optclip=optclip)
