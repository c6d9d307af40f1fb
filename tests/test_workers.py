"""The simulation of windows beyond one machine: what a step takes over links, and where more workers end to help."""
from __future__ import annotations

import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def workers():
    sys.path.append(str(ROOT / "benchmarks"))
    import workers
    yield workers
    sys.path.remove(str(ROOT / "benchmarks"))


def wire(workers, latency: float, width: float):
    return workers.Link("a wire", latency, width)


def test_one_worker_takes_the_sum_and_free_links_share_it_out(workers):
    free, windows = wire(workers, 0.0, 1e30), [(3.0, 10), (3.0, 10), (2.0, 10), (2.0, 10), (2.0, 10)]
    assert workers.step_seconds(windows, 1, free) == 12.0
    assert workers.step_seconds(windows, 2, free) == pytest.approx(7.0)
    assert workers.step_seconds(windows, 5, free) == pytest.approx(3.0)
    assert workers.step_seconds(windows, 64, free) == pytest.approx(3.0)


def test_a_window_that_goes_out_takes_its_way_there_and_back(workers):
    link = wire(workers, 0.5, 10.0)
    # 1 s each: one here, one that takes 1 s and 0.5 s to be there, 1 s, and as long to be back.
    assert workers.step_seconds([(10.0, 10), (10.0, 10)], 2, link) == pytest.approx(1 + 0.5 + 10 + 0.5 + 1)
    # Two go out over one end, one after the other, and come back so.
    assert workers.step_seconds([(10.0, 10)] * 3, 3, link) == pytest.approx(2 + 0.5 + 10 + 0.5 + 1)
    # A link so slow that nothing is sent.
    assert workers.step_seconds([(1.0, 10)] * 3, 3, wire(workers, 9.0, 10.0)) == 3.0


def test_a_window_of_1024_px_is_half_a_megabyte_and_no_number_of_workers_beats_the_longest_window(workers):
    assert workers.BYTES_PER_CELL * 128 * 128 == 2 ** 19
    runs = [workers.planned_run(workers.photo_tree("coffee", 512, 0.6, 64, 0), steps=4, sizes=None)]
    ups = [workers.speed_up(runs, 1.0, count, workers.LINKS[0]) for count in workers.WORKERS]
    assert all(1 <= up <= workers.bound(runs) + 1e-6 for up in ups)
