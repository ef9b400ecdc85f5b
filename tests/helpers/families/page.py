"""docs/models.md: what the sweep found, as a table."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
import transformers

from .measure import Row

TEXT = """\
# Families of transformers models

Written by `scripts/models.py` (`make models`) on {date} with torch {torch} and transformers
{transformers}. Of every family of causal, sequence-to-sequence, speech, image-and-text and masked
models, a tiny one with random weights trains a step, plain and patched by
`crossent.integrations.huggingface.patch`, with the options that are there by default.

- **loss**, **gradients**: those of the patched model are the plain model's, to 1e-5 of the loss and
  1e-4 of the largest entry of each parameter's gradient.
- **logits**: *fused* where no operation of the patched step, forward or backward, had a result as
  large as half of the logits (a mode of torch's dispatcher looks on; crossent is not asked). *made*
  where one had, and which function of the model asked for them, at which line of transformers.

Families of images and sounds are given what they cannot do without; those that can be trained on
text alone are. `-` is a step that was not reached.

## Totals

{totals}

## Where logits are made

{made}

## All families

{table}

## Not measured

{missing}
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _word(value: bool | None, yes: str = "right", no: str = "WRONG") -> str:
    return "-" if value is None else yes if value else no


def _clean(text: str) -> str:
    """Text that does not end a cell of a table, and reads the same on every machine."""
    return text.replace("|", "/").replace("<", "").replace(">", "").replace("`", "")


def page(rows: list[Row]) -> str:
    """The whole page."""
    measured = [row for row in rows if row.loss is not None]
    return TEXT.format(
        date=datetime.date.today().isoformat(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        totals=totals(rows),
        made=_made(measured),
        table=_table(
            ["family", "class", "task", "loss", "gradients", "logits", "reason"],
            [
                [
                    *(row.family.name, f"`{row.family.model}`", row.family.task),
                    *(_word(row.loss), _word(row.gradients), _word(row.fused, "fused", "made")),
                    _clean(row.reason),
                ]
                for row in measured
            ],
        ),
        missing=_table(
            ["family", "class", "task", "reason"],
            [
                [row.family.name, f"`{row.family.model}`", row.family.task, _clean(row.reason)]
                for row in rows
                if row.loss is None
            ],
        ),
    )


def totals(rows: list[Row]) -> str:
    """How many of each task."""
    counts: list[tuple[str, Callable[[Row], bool]]] = [
        ("families", lambda row: True),
        ("measured", lambda row: row.loss is not None),
        ("right", lambda row: bool(row.loss and row.gradients)),
        ("fused", lambda row: bool(row.fused)),
        ("made", lambda row: row.fused is False),
        ("wrong", lambda row: row.loss is not None and not (row.loss and row.gradients)),
    ]
    tasks = list(dict.fromkeys(row.family.task for row in rows))
    lines = []
    for task in [*tasks, "all"]:
        chosen = [row for row in rows if task in (row.family.task, "all")]
        lines.append([task, *(str(sum(map(count, chosen))) for _, count in counts)])
    return _table(["task", *(name for name, _ in counts)], lines)


def _made(rows: list[Row]) -> str:
    """Families by the function that made their logits."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.fused is False:
            groups.setdefault(_clean(row.reason.split(" at ")[0]), []).append(row.family.name)
    lines = [
        [why, str(len(names)), ", ".join(dict.fromkeys(names))] for why, names in groups.items()
    ]
    return _table(["function", "classes", "families"], sorted(lines, key=lambda g: -int(g[1])))
