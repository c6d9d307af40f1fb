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
