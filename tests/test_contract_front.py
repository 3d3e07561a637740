"""Every public name is written down where it must be: the table of cases, the README, a docstring, its own test."""

import inspect
import re
from pathlib import Path

import pytest

import optclip
from tests.cases import CASES

ROOT = Path(__file__).parent.parent
PUBLIC = {name: getattr(optclip, name) for name in optclip.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
RETURNS = {name: str(inspect.signature(function).return_annotation) for name, function in FUNCTIONS.items()}
TRANSFORMATIONS = [name for name, returns in RETURNS.items() if "GradientTransformation" in returns]
SECTIONS = ["When to use", "Args", "State", "Guarantees", "Edge cases", "Departures", "References", "Example"]


def test_the_front_door_is_sorted_and_says_what_it_returns():
    assert optclip.__all__ == sorted(optclip.__all__)
    for name, function in FUNCTIONS.items():
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty, name


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_has_a_case(name):
    assert name in {case.public for case in CASES}


def test_the_table_is_sorted_and_holds_public_names_only():
    names = [case.name for case in CASES]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {case.public for case in CASES} <= set(TRANSFORMATIONS)
    for case in CASES:
        assert case.limit is None or case.limit in inspect.signature(PUBLIC[case.public]).parameters, case.name


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_has_a_row_in_the_readme(name):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(re.search(rf"`(optclip\.)?{name}[`(]", row) for row in rows)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_has_all_sections_in_its_docstring(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    wanted = [s for s in SECTIONS if name != "clip_by" or s in ("Args", "Guarantees", "Example")]
    assert [s for s in wanted if not re.search(rf"^{s}:", text, re.M)] == []
    for argument in inspect.signature(PUBLIC[name]).parameters:
        assert re.search(rf"^ +{argument}:", text, re.M), f"{argument} is not in the Args"


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_public_function_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    assert text.splitlines()[0].endswith((".", "]", ")", '"', "?")), "starts with one line"
    if name != "plot":  # draws
        assert ">>>" in text


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_has_a_test_file_of_its_own(name):
    stem = PUBLIC[name].__module__.rsplit(".", 1)[-1].lstrip("_")
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if not f.name.startswith("test_contract")]
    own = [f for f in files if stem in f.name or f.parent.name == stem or name in f.name]
    assert any(re.search(rf"\b{name}\b", f.read_text()) for f in own), f"no tests/**/test_{stem}.py that names it"
