"""How fast, how cheap, how much memory? Writes RESULTS.md and its plots beside this file.

    python run.py bench [PART ...] [--tiny] [--threads N]

Parts: tree, trees, planning, overhead, budget, memory, cuda; all of them if none is named. `bench quality` measures how the
results look. --tiny runs every part small, to see that it works: its figures say nothing, and are not written.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PARTS = ("tree", "trees", "planning", "overhead", "budget", "memory", "cuda")


def run_part(name: str, tiny: bool) -> str:
    """The part's section of RESULTS.md; its plot, if it has one, is written beside it."""
    import cuda
    import plots
    import sampling_cost
    import tree_and_plan
    import trees

    if name == "tree":
        text, found = tree_and_plan.tree_part(tiny)
        return text if tiny else text + plots.tree_plot(found, HERE / "tree.png")
    if name == "trees":
        text, found = trees.trees_part(tiny)
        return text if tiny else text + plots.pairs_plot(found, HERE / "pairs.png")
    if name == "planning":
        return tree_and_plan.planning_part(tiny)
    if name == "overhead":
        return sampling_cost.overhead_part(tiny)
    if name == "budget":
        text, found = sampling_cost.budget_part(tiny)
        return text if tiny else text + plots.budget_plot(found, HERE / "budget.png")
    if name == "memory":
        return sampling_cost.memory_part(tiny)
    return cuda.cuda_part(tiny)


def main(words: list[str]) -> int:
    if words[:1] == ["quality"]:
        import quality

        return quality.main(words[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(words)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    from measuring import import_host, machine

    import_host()
    sections = ["# Results of `python run.py bench`\n\n" + machine()]
    for name in arguments.parts or PARTS:
        start = time.monotonic()
        sections.append(run_part(name, arguments.tiny))
        print(f"{sections[-1]}\n[{name}: {time.monotonic() - start:.0f} s]\n", flush=True)
    if not arguments.tiny and not arguments.parts:
        (HERE / "RESULTS.md").write_text("\n".join(sections), "utf-8")
        print(f"wrote {HERE / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
