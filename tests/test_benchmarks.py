"""Every benchmark runs, at tiny sizes; nobody judges its times here."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import report

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["floor", "step", "leaves", "methods", "mesh", "per_example"])
def test_runs(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    section = json.loads(path.read_text())[name]
    assert section["quick"] and section["result"] and section["versions"]["optclip"]


def test_the_readme_says_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    results = report.read()
    assert not any(section["quick"] for sections in results.values() for section in sections.values())
    tables = report.rendered(results)
    assert set(tables) == set(re.findall(r"<!-- bench:(\w+) -->", readme))
    assert report.rewrite(readme, tables) == readme
