"""What the training command makes of its argument, and of the curves that its runs leave."""
from __future__ import annotations

import pytest
from conftest import ROOT, load_module

load_module("training", ROOT / "demo" / "training.py")
train = load_module("qtd_train", ROOT / "demo" / "train.py")


@pytest.mark.parametrize(("words", "pace"), [([], 1.0), (["202"], 2.0), (["0.5"], 0.5 / 101)])
def test_the_minutes_that_are_given_are_shared_as_101_are(words, pace):
    assert train.pace_of(words) == pytest.approx(pace)


@pytest.mark.parametrize("word", ["soon", "0", "-3", "nan"])
def test_what_is_no_number_of_minutes_is_refused(word):
    with pytest.raises(SystemExit, match=f"^train: minutes should be a number above 0, got '{word}'"):
        train.pace_of([word])


def test_the_curves_of_runs_are_joined_with_their_minutes_added_up(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "OUT", tmp_path)
    (tmp_path / "first.csv").write_text("minutes,step,loss\n1,10,0.5\n2.5,25,0.25\n")
    (tmp_path / "second.csv").write_text("minutes,step,loss\n1,8,0.2\n")
    train.joined_curves(("first", "second"), tmp_path / "joined.csv")
    assert (tmp_path / "joined.csv").read_text().splitlines() == [
        "run,minutes,step,loss", "first,1,10,0.5", "first,2.5,25,0.25", "second,3.5,8,0.2",
    ]  # fmt: skip


def test_a_run_that_fails_ends_the_training(capfd):
    with pytest.raises(SystemExit, match="a training failed"):
        train.run_beside(["-c", "raise SystemExit('no disk')"], ["-c", "pass"])
    assert "no disk" in capfd.readouterr().err
