"""The matrix: every function, option, backend and mode of autograd against the oracle.

``make fuzz`` runs the same cells with fresh seeds for as long as asked.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .refusals import refuse, refused
from .run import MODES, pairs, run_cell

CELLS = 8  # of each function and mode in a test run; make fuzz draws as many as there is time for


@pytest.mark.parametrize(("function", "mode"), pairs(), ids=lambda name: name.replace(" ", "_"))
def test_cells_agree_with_the_oracle(function, mode, record_property):
    """Hypothesis draws the seeds; each cell can be run alone by its seed."""

    @settings(
        max_examples=MODES[mode].cells or CELLS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # a seed cannot be made smaller; run.minimal makes cells so
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**20))
    def hold(seed):
        outcome = run_cell(seed, function, mode)
        record_property("cell", (function, outcome.backend, outcome.verdict))
        assert outcome.verdict != "wrong", (
            f"run_cell({seed}, {function!r}, {mode!r}): {outcome.message} with {outcome.chosen}"
        )

    hold()


@pytest.mark.parametrize(
    ("name", "case"), refused(), ids=lambda p: p if isinstance(p, str) else p.label
)
def test_what_is_not_served_raises_a_named_error(name, case):
    refuse(name, case)
