"""The comparison of clippers, at a tiny size: table, numbers and picture come out, and its spikes are counted right."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs(compare, tmp_path, capsys):
    result = compare.main(["--steps", "12", "--clippers", "adagc()", "--out", str(tmp_path)])
    assert "| adagc() |" in capsys.readouterr().out
    plain, adagc = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert [plain["clipper"], adagc["clipper"]] == ["none", "adagc()"]
    assert np.shape(adagc["losses"]) == (1, 12) and 0 < adagc["clip_rate"] <= 1 and plain["clip_rate"] is None
    (bad,) = result["bad_steps"]
    assert adagc["losses"][0][-1] < plain["losses"][0][-1], "the bad batch hurts the run without a clipper"
    assert adagc["losses"][0][0] == plain["losses"][0][0] and bad == 3
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_all_clippers_can_be_made(compare):
    assert len(compare.CLIPPERS) == 13
    for make in compare.CLIPPERS.values():
        assert callable(make().update)


def test_spikes(compare):
    losses = np.array([3.0, 2.0, 2.5, 2.2, 2.05, 1.9, 1.95, 2.1, np.nan, 1.5])
    assert compare.spikes(losses[:6]) == (1, pytest.approx(0.5), 2)
    assert compare.spikes(np.array([2.0, 1.0, 1.05])) == (0, 0.0, 0)
    assert compare.spikes(losses) == (2, np.inf, 4)


def test_batches_are_the_same_for_all(compare):
    characters, held_out = compare.text()
    assert len(characters) > 300_000 and len(held_out) > 10_000
    one, two = (compare.batches(characters, 8, 0, np.array([5])) for _ in range(2))
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1][5] == 100 and one[1].sum() == 107
    assert one[0].shape == (8, compare.BATCH, compare.LENGTH + 1)
