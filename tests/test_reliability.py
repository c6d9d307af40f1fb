"""The report of what was tried: each part has a table of its own, and says where it was run."""
from __future__ import annotations

import re
import sys

import pytest
from conftest import ROOT, load_module


@pytest.fixture(scope="module")
def reliability():
    sys.path.append(str(ROOT / "benchmarks"))
    yield load_module("qtd_reliability", ROOT / "benchmarks" / "reliability.py")
    sys.path.remove(str(ROOT / "benchmarks"))


def doors():
    """What doors do.

    Not in the report.
    """
    return [("opened", 3, "all opened"), ("shut", 1200, "all shut")]


def test_a_part_is_a_table_under_its_name_with_what_it_is_about_and_where_it_was_run(reliability):
    heading, about, where, *rows = [line for line in reliability.section("doors", doors).splitlines() if line]
    assert (heading, about) == ("## doors", "What doors do.")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC, ComfyUI \d+\.\d+\.\d+, Python 3\.\d+\.\d+, torch \S+, \w+ \w+, \d+ cores, [\w ]+\.", where)
    assert rows == ["| tried | times | what came out |", "| --- | --- | --- |", "| opened | 3 | all opened |", "| shut | 1200 | all shut |"]


def test_a_part_takes_the_place_of_its_own_table_only(reliability, tmp_path):
    file = tmp_path / "RELIABILITY.md"
    reliability.write(["## doors\n\n| shut |\n", "## windows\n\n| open |\n"], file)
    first = file.read_text("utf-8")
    reliability.write(["## doors\n\n| open |\n"], file)
    assert file.read_text("utf-8") == first.replace("| shut |", "| open |")
    assert first.startswith("# Reliability") and first.index("## doors") < first.index("## windows")


def test_every_part_can_be_found(reliability):
    assert "fuzz" in reliability.PARTS and "mutation" in reliability.PARTS
    assert all(callable(reliability.find_part(name)) and reliability.find_part(name).__doc__ for name in reliability.PARTS)


def test_mutants_are_of_every_module_and_each_has_tests(reliability):
    mutation = sys.modules[reliability.find_part("mutation").__module__]
    modules = set(mutation.modules())
    assert {"windows", "tiled_diffusion"} < modules and modules >= mutation.TESTS.keys()
    assert {name for names in (*mutation.TESTS.values(), mutation.WIDER) for name in names if not (ROOT / "tests" / f"test_{name}.py").exists()} == set()
    mutants = mutation.picked()
    assert len(mutants) == 60 and {mutant.module for mutant in mutants} == modules
    assert mutants == mutation.picked()


def test_a_mutant_changes_one_place_and_is_still_python(reliability, tmp_path):
    mutation = sys.modules[reliability.find_part("mutation").__module__]
    file = tmp_path / "some.py"
    file.write_text("def most(one, other):\n    if one > other and one:\n        return max(one,\n                   other)\n    return 1\n")
    found = {mutant.change: mutant.applied(file.read_text()) for mutant in mutation.mutants_of(file)}
    assert found["one > other -> (one >= other)"].splitlines()[1] == "    if (one >= other) and one:"
    assert found["max(one, other) -> min(one, other)"].splitlines()[2:] == ["        return min(one, other)", "    return 1"]
    assert found["1 -> 2"].splitlines()[-1] == "    return 2"
    assert len(found) == 5 and all(compile(text, "some.py", "exec") for text in found.values())
