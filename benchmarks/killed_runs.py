"""run.py, killed at any moment: what the next one makes of it."""
from __future__ import annotations

import contextlib
import random
import subprocess
import tempfile
from pathlib import Path

READY = "ready True ['comfy', 'main.py', 'requirements.txt']"


def killed_part() -> list[tuple[str, int, str]]:
    """run.py killed (SIGKILL) at random moments while it makes its environment, and then let be: the next run makes all anew, or uses what is complete.

    Raises AssertionError if a run that is let be does not end ready.
    """
    from doors import begin, make_archive

    draw, kills, complete, rounds = random.Random(0), 0, 0, 12
    with tempfile.TemporaryDirectory(prefix="qtd-kills-") as name:
        folder = Path(name)
        archive = make_archive(folder)
        for number in range(rounds):
            cache, longest = folder / f"cache-{number}", 7.0
            for _ in range(3):
                process = begin(cache, archive)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0.05, longest))
                kills += process.poll() is None
                process.kill()
                process.communicate()
            complete += any(cache.glob("env-*/.complete"))
            process = begin(cache, archive)
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0 and not errors and out.splitlines()[-1] == READY, (out, errors)
    return [(
        "run.py killed up to three times on one cache, at moments drawn from 0.05 to 7 s, then let be", kills,
        f"{rounds} of {rounds} runs that were let be ended ready; {complete} found a complete environment and used it")]
