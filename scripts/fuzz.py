"""Cells of tests/matrix with fresh seeds, for as long as asked; failures are made small.

python scripts/fuzz.py --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.matrix.count import table
from tests.matrix.run import Outcome, minimal, pairs, run_cell


def main() -> int:
    """Run cells until time is up; the exit code says whether one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="where seeds start; drawn if left")
    parser.add_argument("--function", default="", help="only functions whose name holds this")
    parser.add_argument("--mode", default="", help="only modes whose name holds this")
    arguments = parser.parse_args()
    start = random.SystemRandom().randrange(2**30) if arguments.seed is None else arguments.seed
    chosen = [p for p in pairs() if arguments.function in p[0] and arguments.mode in p[1]]
    print(f"seeds from {start}, {arguments.seconds:g} s, {len(chosen)} pairs of function and mode")
    torch.set_num_threads(1)
    outcomes, wrong = hunt(chosen, start, arguments.seconds)
    report(outcomes, wrong)
    return 1 if wrong else 0


def hunt(
    chosen: list[tuple[str, str]], start: int, seconds: float
) -> tuple[Counter[tuple[str, str, str, str]], dict[str, list[Outcome]]]:
    """Cells by (function, backend, mode, verdict), and what was wrong by kind."""
    outcomes: Counter[tuple[str, str, str, str]] = Counter()
    wrong: dict[str, list[Outcome]] = {}
    end, seed = time.monotonic() + seconds, start
    while True:
        for function, mode in chosen:
            if time.monotonic() > end:
                return outcomes, wrong
            outcome = run_cell(seed, function, mode)
            outcomes[function, outcome.backend, mode, outcome.verdict] += 1
            if outcome.verdict == "wrong":
                wrong.setdefault(outcome.kind, []).append(outcome)
        seed += 1


def report(outcomes: Counter[tuple[str, str, str, str]], wrong: dict[str, list[Outcome]]) -> None:
    """Print the tables, then each kind of failure once."""
    for title, place in (("function", 0), ("mode", 2)):
        counts = [((key[place], key[1], key[3]), count) for key, count in outcomes.items()]
        print("\n" + table(title, counts))
    refused = sum(count for key, count in outcomes.items() if key[3] == "refused")
    print(f"\nof all cells {refused} were refused by a named error that the documentation promises")
    for kind, found in wrong.items():
        least = minimal(found[0])
        print(f"\n{kind}: {len(found)} cells\n  {least.message}")
        print(f"  run_cell({least.seed}, {least.function!r}, {least.mode!r})  # {least.chosen}")


if __name__ == "__main__":
    raise SystemExit(main())
