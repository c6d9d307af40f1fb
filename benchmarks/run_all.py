"""How fast, how cheap, how much memory? Writes RESULTS.md and its plots beside this file.

    python run.py bench [PART ...] [--write] [--tiny] [--threads N]

Parts: tree, trees, planning, overhead, budget, memory, cuda, operations, decode, encode, workers; all of them if none is named. Named parts are
shown, and with --write take the place of what stands in RESULTS.md. `bench quality` measures how the results look, and
`bench reliability` shows what holds under fuzz and faults. --tiny runs every part small, to see that it works: its figures
say nothing, and are not written.
"""
from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("tree", "trees", "planning", "overhead", "budget", "memory", "cuda", "operations", "decode", "encode", "workers")


def run_part(name: str, tiny: bool) -> str:
    """The part's section of RESULTS.md; its plot, if it has one, is written beside it."""
    import counted
    import cuda
    import decoding
    import encoding
    import plots
    import sampling_cost
    import tree_and_plan
    import trees
    import workers

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
    if name == "decode":
        return decoding.decode_part(tiny)
    if name == "encode":
        return encoding.encode_part(tiny)
    if name == "workers":
        return workers.workers_part(tiny)
    return counted.operations_part(tiny) if name == "operations" else cuda.cuda_part(tiny)


def main(words: list[str]) -> int:
    if words[:1] == ["quality"]:
        import quality

        return quality.main(words[1:])
    if words[:1] == ["reliability"]:
        import reliability

        return reliability.main(words[1:])
    from measuring import import_host, machine, parsed

    arguments = parsed(words, __doc__, PARTS, "--write", "--tiny")
    import_host()
    sections = ["# Results of `python run.py bench`\n\n" + machine()]
    for name in arguments.parts or PARTS:
        start = time.monotonic()
        sections.append(run_part(name, arguments.tiny))
        print(f"{sections[-1]}\n[{name}: {time.monotonic() - start:.0f} s]\n", flush=True)
    if not arguments.tiny and (arguments.write or not arguments.parts):
        write(sections, bool(arguments.parts))
    return 0


def write(sections: list[str], only_some: bool) -> None:
    """Write RESULTS.md: all of it, or some parts' sections in their places."""
    from measuring import with_section

    file = HERE / "RESULTS.md"
    results = "\n".join(sections)
    if only_some:
        results = functools.reduce(with_section, sections[1:], file.read_text("utf-8"))
    file.write_text(results, "utf-8")
    print(f"wrote {file}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
