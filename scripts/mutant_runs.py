"""Run the tests of mutants in copies of the tree, by forks of a process that knows torch.

A fork has torch, pytest and what else is slow to import; it imports crossent fresh, from its copy.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from compileall import compile_dir
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from mutants import Mutant

# Imported before the forks, where they are installed.
_WARM = (
    "torch torch._dynamo torch.func torch.testing numpy mpmath pytest _pytest.assertion.rewrite "
    "hypothesis pandas rich.table jinja2 click matplotlib.pyplot sklearn.metrics torchmetrics "
    "fastai.losses torch._subclasses torch.testing._internal.common_methods_invocations"
)
# Seconds of the processor: a test that takes longer waits for the fast ones of all files; one that
# takes even longer runs in `make test` alone.
_FAST, _SLOW = 0.3, 4.0
_COPIED = ("src", "tests", "docs", "csrc", "scripts", "examples", "benchmarks")
_OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-m", "not slow")
# Never among the fast ones: left out before they are timed.
_LEFT_OUT = "compile opcheck instruction_sets long_rows processes less_memory lightning"


class Run(NamedTuple):
    """A mutant, and the test that found it (empty: none did)."""

    mutant: Mutant
    killed_by: str


class _Chosen:
    """A pytest plugin: runs the tests that take so long, and writes down how it went."""

    def __init__(self, durations: dict[str, float] | None, within: tuple[float, float]) -> None:
        self.durations, self.within = durations, within
        self.took: dict[str, float] = {}
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list) -> None:
        known = self.durations
        if known is not None:
            least, most = self.within
            kept = [i for i in items if least <= known.get(i.nodeid, _SLOW) < most]
            items[:] = sorted(kept, key=lambda item: known[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before = sum(os.times()[:4])
        result = yield
        self.took[item.nodeid] = sum(os.times()[:4]) - before
        return result

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"


class Runner:
    """Copies of the tree, one for each process, and what is known of the tests."""

    def __init__(self, root: Path, folder: Path, processes: int, verbose: bool) -> None:
        self.verbose = verbose
        self.copies = [folder / f"copy{i}" for i in range(processes)]
        self.durations: dict[str, float] = {}
        self.tests: dict[str, tuple[str, ...]] = {}
        self.kills: Counter[str] = Counter()  # by file: those that killed many come first
        for copy in self.copies:
            _copy(root, copy)
        _warm_up()

    def measure(self, tests: dict[str, tuple[str, ...]]) -> None:
        """Run all of the tests on the code as it is: they pass, and take so long.

        Raises:
            SystemExit: a test fails without any mutant.
        """
        self.tests = tests
        files = list(dict.fromkeys(file for some in tests.values() for file in some))
        shares = [files[i :: len(self.copies)] for i in range(len(self.copies))]
        jobs = [("", share) for share in shares if share]
        for _, result in self._each(jobs, limit=1800.0):
            failed, *lines = result.splitlines() or ["nothing was run"]
            if failed:
                raise SystemExit(f"without a mutant, this fails: {failed}")
            for line in lines:
                seconds, name = line.split(" ", 1)
                self.durations[name] = float(seconds)

    def run(self, mutants: list[Mutant]) -> list[Run]:
        """What becomes of each mutant, in their order."""
        jobs = [(mutant, self.tests[mutant.module]) for mutant in mutants]
        found = {}
        for i, (place, result) in enumerate(self._each(jobs, limit=0.0)):
            found[place] = Run(mutants[place], result.partition("\n")[0])
            self.kills[found[place].killed_by.partition("::")[0]] += 1
            if self.verbose:
                print(f"{mutants[place]}\n    {found[place].killed_by or 'SURVIVED'}", flush=True)
            elif sys.stderr.isatty():
                print(f"\r{i + 1} of {len(jobs)} ", end="", file=sys.stderr, flush=True)
        return [found[place] for place in sorted(found)]

    def _limit(self, files: Iterable[str]) -> float:
        """Seconds after which a mutant is taken to run for ever."""
        chosen = tuple(files)
        fast = (
            seconds
            for name, seconds in self.durations.items()
            if seconds < _SLOW and name.startswith(chosen)
        )
        return 60 + 5 * sum(fast)

    def _each(self, jobs: list, limit: float) -> Iterable[tuple[int, str]]:
        """Run jobs (a mutant or "", test files) on all copies; yields their place and result."""
        free, running = list(self.copies), {}
        waiting = list(enumerate(jobs))[::-1]
        while waiting or running:
            while waiting and free:
                place, (mutant, files) = waiting.pop()
                copy = free.pop()
                undo = _mutate(copy, mutant)
                pid = self._fork(copy, mutant, sorted(files, key=lambda f: -self.kills[f]))
                deadline = time.monotonic() + (limit or self._limit(files))
                running[pid] = place, copy, deadline, undo
            time.sleep(0.02)
            for pid, (place, copy, deadline, undo) in list(running.items()):
                ended = os.waitpid(pid, os.WNOHANG)[0] != 0
                if not ended and time.monotonic() < deadline:
                    continue
                result = (copy / "result").read_text() if ended else "took too long"
                if not ended:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del running[pid]
                undo()
                free.append(copy)
                yield place, result

    def _fork(self, copy: Path, mutant: Mutant | str, files: Iterable[str]) -> int:
        (copy / "result").write_text("the process died")
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        try:
            result = _tested(copy, list(files), None if mutant == "" else self.durations)
            (copy / "result").write_text(result)
        except BaseException as error:
            (copy / "result").write_text(f"the process died: {error!r}")
        finally:
            os._exit(0)


def _mutate(copy: Path, mutant: Mutant | str) -> Callable[[], None]:
    """Change the copy; what undoes it."""
    shutil.rmtree(copy / ".hypothesis", ignore_errors=True)  # examples of another mutant
    if isinstance(mutant, str):
        return lambda: None
    path = copy / mutant.path
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.mutation.applied(original), encoding="utf-8")
    return lambda: path.write_text(original, encoding="utf-8") and None


def _copy(root: Path, copy: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in _COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=ignored)
    for path in root.iterdir():
        if path.is_file() and path.suffix in (".py", ".toml", ".md"):
            shutil.copy(path, copy / path.name)
    # Compiled files that are known by the source's hash: a mutant's time and size may be the same.
    compile_dir(copy / "src", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


def _warm_up() -> None:
    import warnings

    warnings.simplefilter("ignore")
    for name in _WARM.split():
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    if any(name.partition(".")[0] == "crossent" for name in sys.modules):
        raise SystemExit("crossent was imported before the forks: mutants would not be seen")


def _tested(copy: Path, files: list[str], durations: dict[str, float] | None) -> str:
    """In a fork: import crossent from the copy and run the tests; what failed, and durations."""
    from _pytest.assertion.rewrite import AssertionRewritingHook

    # Plugins are imported already, which pytest would warn of.
    AssertionRewritingHook._warn_already_imported = lambda *_: None  # type: ignore[method-assign]
    os.chdir(copy)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path[:0] = [str(copy / "src"), str(copy)]
    os.environ["PYTHONPATH"] = str(copy / "src")
    left_out = " and ".join(f"not {name}" for name in _LEFT_OUT.split())
    # A mutant's files one by one: most die in the first, and the others are not even collected.
    groups = [(files, (0.0, math.inf))]
    if durations is not None:
        groups = [*(([file], (0.0, _FAST)) for file in files), (files, (_FAST, _SLOW))]
    for group, within in groups:
        chosen = _Chosen(durations, within)
        status = pytest.main([*_OPTIONS, "-k", left_out, *group], plugins=[chosen])
        failed = chosen.failed or (
            f"pytest ended with {int(status)}" if status not in (0, 5) else ""
        )
        if failed:
            break
    crossent = sys.modules.get("crossent")
    if crossent is not None and not str(crossent.__file__).startswith(str(copy)):
        return f"crossent was imported from {crossent.__file__}"
    return "\n".join([failed, *(f"{s:.4f} {name}" for name, s in chosen.took.items())])
