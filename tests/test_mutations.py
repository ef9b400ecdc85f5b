"""scripts/mutations.py: what it changes, and what it leaves alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def made(monkeypatch):
    """What each mutation of a line makes of it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import mutations

    yield lambda source: {m.after for m in mutations.mutations(source)}
    sys.modules.pop("mutations", None)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = x < y", {"a = (x <= y)", "a = (x >= y)"}),
        ("a = x == y", {"a = (x != y)"}),
        ("a = x + y", {"a = x - y"}),
        ("a = b[x * y]", {"a = b[(x / y)]"}),
        ("a += b", {"a -= b"}),
        ("a = 2", {"a = 3", "a = 1"}),
        ("a = 0.5", {"a = 5.0", "a = 1.0"}),
        ("a = True", {"a = False"}),
        ("a = x and y", {"a = x or y"}),
        ("a = not x", {"a = x"}),
        ("a = -x", {"a = x"}),
        ("a = x.abs()", {"a = x"}),
        ("a = x.detach() * y", {"a = x * y", "a = x.detach() / y"}),
        ("a = math.ceil(x)", {"a = math.floor(x)"}),
        ("a = min(x, y)", {"a = max(x, y)"}),
        ("a = f(x, b=y)", {"a = f(x)"}),
        ("def f(): return x", {"def f(): return None"}),
        ("check(x)", {"pass"}),
        ("a = b if c else d", {"a = b if (not c) else d"}),
        ("é = 'ü', x < y", {"é = 'ü', (x <= y)", "é = 'ü', (x >= y)"}),
    ],
)
def test_changes(made, source, expected):
    assert made(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "a = 'text'",
        "a: Literal[3]",
        "import b",
        "a = f'{x + 1}'",
        "if TYPE_CHECKING: a = 1",
        "raise ValueError('no', 1)",
        "def f(a: Literal[1]) -> Literal[2]: ...",
    ],
)
def test_what_has_no_behaviour_stays(made, source):
    assert made(source) == set()


def test_a_change_over_lines_is_known_by_all_of_them(made):
    source = "a = f(\n    x,\n    b=y,\n)\n"
    assert made(source) == {"a = f(x)"}


def test_hand_made_ones_are_found_once(made):
    import mutations

    found = mutations.hand_made("a = 1\nb = ceil(2)\n", "ceil", "floor")
    assert (found.line, found.before, found.after) == (2, "b = ceil(2)", "b = floor(2)")
    assert found.applied("a = 1\nb = ceil(2)\n") == "a = 1\nb = floor(2)\n"
    assert mutations.hand_made("ceil ceil", "ceil", "floor") is None
    assert mutations.hand_made("", "ceil", "floor") is None
