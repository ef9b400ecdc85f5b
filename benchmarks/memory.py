"""Memory and time of calls besides the plain loss, beside torch's compositions.

    python benchmarks/memory.py [--write] [--seconds S]

Memory is the peak of resident memory that a forward and a backward add, in a process of its own,
divided by the bytes of the logits. The gradient itself is 1. Times are of a forward and a backward;
"reference" is what serves where there are no kernels.
"""

from __future__ import annotations

from typing import Any

import click
import torch
import torch.nn.functional as F
from harness import alternate, peak_memory, report

import crossent

MARK = "<!-- table: benchmarks/memory.py --write -->"
ROWS, CLASSES = 2048, 8192  # 64 MiB of float32
TIMED = ((ROWS, CLASSES), (65536, 10))
CASES = {  # ours, torch's: expressions in the names below
    "entropy": (
        "crossent.entropy(x).sum()",
        "(lambda logp: -(logp.exp() * logp).sum())(torch.log_softmax(x, -1))",
    ),
    "logit_scale, a tensor": (
        "crossent.cross_entropy(x, t, logit_scale=scale)",
        "F.cross_entropy(x * scale, t)",
    ),
    "log_prob of 4 classes a row": (
        "crossent.log_prob(x, several).sum()",
        "torch.log_softmax(x, -1).gather(-1, several).sum()",
    ),
    "sample_weight with a gradient": (
        "crossent.cross_entropy(x, t, sample_weight=factor)",
        "(F.cross_entropy(x, t, reduction='none') * factor).sum() / factor.sum()",
    ),
    "second derivative": ("crossent.cross_entropy(x, t)", "F.cross_entropy(x, t)"),
}
SETTING = """
import crossent, torch.nn.functional as F
torch.manual_seed(0)
x = torch.randn({rows}, {classes}, requires_grad=True)
t, several = torch.randint({classes}, ({rows},)), torch.randint({classes}, ({rows}, 4))
scale = torch.tensor(0.7, requires_grad=True)
factor = torch.rand({rows}, requires_grad=True)
"""


def statement(name: str, expression: str) -> str:
    """One call and its backward."""
    if name != "second derivative":
        return f"({expression}).backward()"
    return f"torch.autograd.grad({expression}, x, create_graph=True)[0].square().sum().backward()"


def units(name: str, expression: str) -> float:
    """The peak of one call and its backward, in units of the logits."""
    setting = SETTING.format(rows=ROWS, classes=CLASSES)
    code = f"{setting}\ndef step():\n    {statement(name, expression)}\n"
    return peak_memory(code) * 2**20 / (4 * ROWS * CLASSES)


def times(name: str, rows: int, classes: int, seconds: float) -> list[str]:
    """Milliseconds of one call and its backward: ours, by the reference, torch's composition."""
    names: dict[str, Any] = {"torch": torch, "crossent": crossent, "F": F}
    exec(SETTING.format(rows=rows, classes=classes), names)
    ours, theirs = CASES[name]
    plain = ours.replace("crossent.cross_entropy(x, t", "crossent.cross_entropy(x, t, **how")
    plain = plain.replace("entropy(x)", "entropy(x, **how)").replace("several)", "several, **how)")
    names["how"] = {"backend": "reference"}
    cleared = "x.grad = scale.grad = factor.grad = None"
    runs = {}
    for who, expression in (("crossent", ours), ("reference", plain), ("torch", theirs)):
        exec(f"def {who}_():\n    {statement(name, expression)}\n    {cleared}\n", names)
        runs[who] = names[f"{who}_"]
    found = alternate(runs, seconds, rounds=5)
    ratio = found["torch"].median / found["crossent"].median
    return [f"{rows} x {classes}, {name}", *map(str, found.values()), f"{ratio:.2f}"]


@click.command()
@click.option("--write", is_flag=True, help="Write the tables into docs/performance.md.")
@click.option("--seconds", default=2.0, help="How long each call is timed for.")
def main(write: bool, seconds: float) -> None:
    """Print the tables."""
    lines = [
        [name, *(f"{units(name, expression):.1f}" for expression in both)]
        for name, both in CASES.items()
    ]
    title = f"peak memory / bytes of the logits ({ROWS} x {CLASSES} float32)"
    memory = (title, ("forward and backward", "crossent", "torch"), lines)
    timed = [times(name, *shape, seconds) for shape in TIMED for name in CASES]
    headings = (
        "float32, forward and backward",
        "crossent",
        "reference",
        "torch",
        "torch / crossent",
    )
    report([memory, ("milliseconds", headings, timed)], MARK if write else None)


if __name__ == "__main__":
    main()
