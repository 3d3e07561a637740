import jax
import pytest


def pytest_collection_modifyitems(config, items):
    """The long sweeps of this folder run when a marker expression asks for them (``-m slow``)."""
    if not config.getoption("-m"):
        skip = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if "per_example" in item.nodeid and item.get_closest_marker("slow"):
                item.add_marker(skip)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
