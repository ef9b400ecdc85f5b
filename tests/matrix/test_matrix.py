"""The matrix: every function, option, backend and mode of autograd against the oracle.

``make fuzz`` runs the same cells with fresh seeds for as long as asked.
"""

from __future__ import annotations

import inspect

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crossent

from .refusals import refuse, refused
from .run import MODES, pairs, run_cell
from .table import FUNCTIONS

CELLS = 6  # of each function and mode in a test run; make fuzz draws as many as there is time for


@pytest.mark.parametrize(("function", "mode"), pairs(), ids=lambda name: name.replace(" ", "_"))
def test_cells_agree_with_the_oracle(function, mode):
    """Hypothesis draws the seeds; a failing one is made small and can be run alone."""

    @settings(
        max_examples=MODES[mode].cells or CELLS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**20))
    def hold(seed):
        outcome = run_cell(seed, function, mode)
        assert outcome.verdict != "wrong", (
            f"run_cell({seed}, {function!r}, {mode!r}): {outcome.message} with {outcome.chosen}"
        )

    hold()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_has_a_row(name):
    """A new option without a row in the table fails here."""
    function = FUNCTIONS[name]
    parameters = set(inspect.signature(function.signature).parameters)
    listed = set(function.parameters)
    if name in ("CrossEntropyLoss", "LinearCrossEntropyLoss"):
        own = set(inspect.signature(getattr(crossent, name)).parameters)
        parameters |= {n for n in own if n in ("size_average", "reduce")}
    assert listed == parameters


@pytest.mark.parametrize(
    ("name", "case"), refused(), ids=lambda p: p if isinstance(p, str) else p.label
)
def test_what_is_not_served_raises_a_named_error(name, case):
    refuse(name, case)
