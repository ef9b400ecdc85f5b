"""Mutation testing: does a small change of the code make a test fail?

    python scripts/mutants.py                      hand-made mutants, then a sample of each module
    python scripts/mutants.py --sample 0           hand-made mutants, then every mutant
    python scripts/mutants.py --module problem/warnings        one module
    python scripts/mutants.py --list               the mutants of a sample, not run
    python scripts/mutants.py --sample 0 --verbose --killed LOG
                                                   every mutant but those that LOG, what --verbose
                                                   printed before, names a test for

Each mutant runs the tests that its module is for, the fastest of a file first, until one fails. It
survives where none does: then a test is missing, or the change makes no difference, and
tests/mutants_excused.toml says why; those excused there are not run. Nothing is written into the
working tree: mutants live in copies of it, and are run by forks of one process that has imported
torch already.

The status is 1 where a mutant survives without an excuse, or an excuse or a hand-made mutant
fits no line any more.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings it
    import tomli as tomllib

from mutant_runs import Run, Runner
from mutations import Mutation, hand_made, mutations

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("src", "crossent")
EXCUSES = Path("tests", "mutants_excused.toml")

_WHOLE = (
    "options log_prob_and_entropy against_torch better_than_torch properties derivatives exported "
    "memory modules patching"
)
_BACKENDS = (
    "backends/derivative_formulas backends/dispatch backends/extreme_logits backends/kernels "
    "backends/ops backends/reduction backends/reuse_input backends/one_pass"
)
_LOSS = f"problem/* {_BACKENDS} {_WHOLE} learn/calculus head/linear* head/row_functions"
_HEAD = "head/*"
_REPORT = "report/* problem/arrays"
# Each module, and the test files that are run for it: FOLDER/NAME is tests/FOLDER/test_NAME.py, and
# a star stands for any name.
MODULES = {
    "problem/rows": f"{_LOSS} head/chunk_plan",
    "problem/preparation": f"{_LOSS} head/chunk_plan",
    "problem/checks": f"{_LOSS} head/chunk_plan",
    "backends/reduction": f"{_LOSS} head/chunk_plan",
    "problem/warnings": (
        "problem/* options log_prob_and_entropy modules patching better_than_torch "
        "backends/reduction backends/dispatch backends/one_pass report/diagnosis"
    ),
    "learn/calculus": (
        "learn/* problem/* log_prob_and_entropy options better_than_torch backends/reduction "
        "backends/extreme_logits report/explanation report/findings"
    ),
    "backends/numerics": f"{_LOSS} backends/numerics",
    "head/sparse": f"{_HEAD} problem/* backends/reduction backends/dispatch memory exported",
    "report/diagnose": _REPORT,
    "integrations/sklearn": "integrations/log_loss* integrations/scorer problem/arrays",
    "integrations/labels": "integrations/log_loss* integrations/scorer problem/arrays",
}
# Mutants that once survived every test: module, text, what it becomes.
HAND_MADE = (
    ("backends/reduction", "else math.nan), 0.0", "else math.nan), 1.0"),
    ("problem/checks", "place[-1] += shift", "pass"),
    (
        "head/row_functions",
        "(grad_output * rows.denominator_weight).abs()",
        "grad_output * rows.denominator_weight",
    ),
    ("report/tables", "-(-percent * len(losses) // 100)", "max(1, percent * len(losses) // 100)"),
    ("problem/warnings", "tolerance = 1e-3 if", "tolerance = 1e-2 if"),
    ("report/diagnose", "1.05 * chance", "1.5 * chance"),
    ("report/diagnose", "< 0.7 * means[0]", "< 0.95 * means[0]"),
    ("report/diagnose", "after < 0.98 * before", "after < 0.5 * before"),
)
_TESTS_OF_OTHERS = {"head/row_functions": _HEAD, "report/tables": _REPORT}


class Mutant(NamedTuple):
    """A mutation of a module."""

    module: str
    mutation: Mutation

    @property
    def path(self) -> Path:
        """The file that it changes."""
        return PACKAGE / f"{self.module}.py"

    @property
    def key(self) -> tuple[str, str, str]:
        """What an excuse knows it by."""
        return self.module, self.mutation.before, self.mutation.after

    def __str__(self) -> str:
        m = self.mutation
        return f"{self.path}:{m.line}\n    - {m.before}\n    + {m.after}"


def excuses(root: Path) -> dict[tuple[str, str, str], str]:
    """Reasons, by module, line before and line after."""
    path = root / EXCUSES
    entries = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {(e["module"], e["before"], e["after"]): e["reason"] for e in entries.get("excused", [])}


def chosen(root: Path, module: str, sample: int, seed: int) -> list[Mutant]:
    """Mutants of a module: all (sample 0), or as many drawn with a seed."""
    source = (root / PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    found = mutations(source)
    if 0 < sample < len(found):
        drawn = random.Random(f"{seed} {module}").sample(range(len(found)), sample)
        found = [found[i] for i in sorted(drawn)]
    return [Mutant(module, mutation) for mutation in found]


def hand_made_mutants(root: Path) -> tuple[list[Mutant], list[str]]:
    """Those whose text is found, and complaints about the others."""
    found, complaints = [], []
    for module, old, new in HAND_MADE:
        path = root / PACKAGE / f"{module}.py"
        source = path.read_text(encoding="utf-8") if path.exists() else ""
        mutation = hand_made(source, old, new)
        if mutation is None:
            complaints.append(f"HAND_MADE: expected {old!r} once in {path.relative_to(root)}")
        else:
            found.append(Mutant(module, mutation))
    return found, complaints


def tests_for(root: Path, module: str) -> tuple[str, ...]:
    """The test files of a module, as paths in the tree.

    Raises:
        SystemExit: the table names a file that is no more.
    """
    files: dict[str, None] = {}
    for name in (MODULES | _TESTS_OF_OTHERS)[module].split():
        folder, _, stem = name.rpartition("/")
        found = sorted((root / "tests" / folder).glob(f"test_{stem}.py"))
        if not found:
            raise SystemExit(f"{module}: no test file is called {name}")
        files |= dict.fromkeys(path.relative_to(root).as_posix() for path in found)
    return tuple(files)


def report(title: str, runs: list[Run], excused: list[Mutant]) -> int:
    """Print a table and the survivors; how many there are."""
    outcome = Counter((m.module, "excused") for m in excused)
    outcome += Counter((r.mutant.module, "killed" if r.killed_by else "survived") for r in runs)
    surviving = [run.mutant for run in runs if not run.killed_by]
    print(
        f"\n{title}\n{'module':20}{'mutants':>9}{'killed':>9}{'survived':>9}{'excused':>9}  score"
    )
    rows = list(dict.fromkeys(m.module for m in [*(run.mutant for run in runs), *excused]))
    for row in [*rows, "all"]:
        modules = rows if row == "all" else [row]
        words = ("killed", "survived", "excused")
        killed, survived, left_out = (sum(outcome[m, w] for m in modules) for w in words)
        score = killed / (killed + survived) if killed + survived else 1.0
        total = killed + survived + left_out
        print(f"{row:20}{total:9}{killed:9}{survived:9}{left_out:9}  {score:.1%}")
    for mutant in surviving:
        print(f"\nsurvived: {mutant}")
    return len(surviving)


def stale(root: Path, known: dict[tuple[str, str, str], str]) -> list[str]:
    """Excuses for mutants that are no more."""
    there = {m.key for module in MODULES for m in chosen(root, module, 0, 0)}
    return [f"{EXCUSES}: no such mutant: {key[0]}: {key[2]}" for key in known if key not in there]


def killed_in(log: Path) -> dict[str, str]:
    """The tests that an earlier run named, by what it printed of the mutant."""
    lines = log.read_text(encoding="utf-8").splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith("    tests/")]
    return {_place_free("\n".join(lines[max(i - 3, 0) : i])): lines[i].strip() for i in ends}


def _place_free(mutant: str) -> str:
    """What is printed of a mutant, without its line's number, which edits move."""
    path, _, rest = mutant.partition(":")
    return path + rest.lstrip("0123456789")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=40, help="mutants a module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which ones are drawn")
    parser.add_argument("--module", action="append", choices=MODULES, help="may be repeated")
    parser.add_argument("--killed", action="append", type=Path, default=[], help="an earlier log")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="name the test that kills each")
    return parser.parse_args()


def main() -> int:
    """Run what was asked for; the status."""
    asked = arguments()
    drawn = [
        mutant
        for module in asked.module or MODULES
        for mutant in chosen(ROOT, module, asked.sample, asked.seed)
    ]
    if asked.list:
        print("\n".join(map(str, drawn)))
        return 0
    began = time.monotonic()
    by_hand, complaints = ([], []) if asked.module else hand_made_mutants(ROOT)
    modules = {mutant.module for mutant in by_hand + drawn}
    tests = {module: tests_for(ROOT, module) for module in modules}
    known = excuses(ROOT)
    excused = [m for m in drawn if m.key in known]
    drawn = [m for m in drawn if m.key not in known]
    before = {key: test for log in asked.killed for key, test in killed_in(log).items()}
    earlier = [Run(m, before[key]) for m in drawn if (key := _place_free(str(m))) in before]
    drawn = [m for m in drawn if _place_free(str(m)) not in before]
    surviving = 0
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(ROOT, Path(folder), asked.processes, asked.verbose)
        runner.measure(tests)
        if by_hand:
            surviving += report("Made by hand", runner.run(by_hand), [])
        title = f"Drawn with seed {asked.seed}" if asked.sample else "All"
        surviving += report(title, earlier + runner.run(drawn), excused)
    complaints += stale(ROOT, known)
    print(*complaints, sep="\n")
    print(f"{time.monotonic() - began:.0f} s")
    return int(bool(surviving or complaints))


if __name__ == "__main__":
    sys.exit(main())
