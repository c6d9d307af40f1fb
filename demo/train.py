"""Trains the demo's models from nothing, run by run as MODEL_CARD.md tells, and puts them in place of those in demo/models.

    python run.py train [MINUTES]

Takes two cores for 101 minutes, or MINUTES, in which the runs share alike. What each run leaves is in demo/out/training.
"""
from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

from training import MODELS, draw_curves

HERE = Path(__file__).resolve().parent
OUT = HERE / "out" / "training"
MINUTES = {"cells": 7, "pixels": 7, "whole": 20, "denoiser": 30, "sharpener": 44}


def command(name: str, pace: float, *words: str) -> list[str]:
    """One training in a process of its own; pace: its minutes over those in MINUTES."""
    script = "train_denoiser.py" if name in ("denoiser", "sharpener") else "train_autoencoder.py"
    return [
        str(HERE / script), "--minutes", str(MINUTES[name] * pace), "--out", str(weights(name)), "--curve", str(curve(name)), *words,
    ]  # fmt: skip


def weights(name: str) -> Path:
    return OUT / f"{name}.safetensors"


def curve(name: str) -> Path:
    return OUT / f"{name}.csv"


def run_beside(*commands: list[str]) -> None:
    """Run them at the same time, one core each."""
    processes = [subprocess.Popen([sys.executable, *each]) for each in commands]
    if any([process.wait() for process in processes]):
        sys.exit("train: a training failed; its error is above.")


def run_on_both_cores(words: list[str]) -> None:
    run_beside(["-m", "torch.distributed.run", "--nproc-per-node", "2", *words])


def train_autoencoder(pace: float) -> None:
    """Low and high resolutions apart, since each is cheaper than the whole; then the whole."""
    run_beside(
        command("cells", pace, "--stage", "cells", "--batch", "10", "--side", "96", "--fewer-blocks"),
        command("pixels", pace, "--stage", "pixels", "--batch", "6", "--side", "64", "--fewer-blocks"),
    )
    run_on_both_cores(command(
        "whole", pace, "--batch", "8", "--side", "96", "--synthetic-share", "0.15", "--seed", "11",
        "--resume", str(weights("cells")), "--pixels-from", str(weights("pixels"))))


def train_denoiser(pace: float) -> None:
    """From crisp pictures alone; then from soft ones, too, which it turns into crisp ones."""
    common = ("--autoencoder", str(weights("whole")), *(("--compile",) if shutil.which("g++") else ()))
    run_on_both_cores(command("denoiser", pace, *common, "--seed", "2"))
    run_on_both_cores(command(
        "sharpener", pace, *common, "--seed", "50", "--soft-share", "0.6", "--learning-rate", "1.5e-3", "--resume", str(weights("denoiser"))))


def joined_curves(names: tuple[str, ...], out: Path) -> None:
    """The rows of several runs in one file, their minutes added up."""
    rows, before = [], 0.0
    for name in names:
        with curve(name).open() as log:
            found = list(csv.DictReader(log))
        rows += [{"run": name, **row, "minutes": f"{before + float(row['minutes']):.4g}"} for row in found]
        before = float(rows[-1]["minutes"])
    with out.open("w", newline="") as log:
        writer = csv.DictWriter(log, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def publish() -> None:
    """Copy the weights to demo/models and the curves to where the model card shows them."""
    for name, model, runs in (("whole", "autoencoder", ("cells", "whole")), ("sharpener", "denoiser", ("denoiser", "sharpener"))):
        shutil.copy(weights(name), MODELS / f"{model}.safetensors")
        log = HERE / f"{model}_curve.csv"
        joined_curves(runs, log)
        draw_curves(log, log.with_suffix(".png"))


def pace_of(words: list[str]) -> float:
    """The minutes that were asked for over those that all runs take; `pixels` runs beside `cells`."""
    if not words:
        return 1.0
    if not re.fullmatch(r"\d+(\.\d+)?", words[0]) or float(words[0]) == 0:
        sys.exit(f"train: minutes should be a number above 0, got {words[0]!r}.")
    return float(words[0]) / (sum(MINUTES.values()) - MINUTES["pixels"])


def main() -> None:
    pace = pace_of(sys.argv[1:])
    shutil.rmtree(OUT, ignore_errors=True)
    train_autoencoder(pace)
    train_denoiser(pace)
    publish()


if __name__ == "__main__":
    main()
