"""Memory of calls that no kernel serves, beside torch: peaks in units of the logits.

    python benchmarks/memory.py [--write]

Each figure is the peak of resident memory that a forward and a backward add, in a process of its
own, divided by the bytes of the logits. The gradient itself is 1.
"""

from __future__ import annotations

import click
from harness import peak_memory, report

MARK = "<!-- table: benchmarks/memory.py --write -->"
ROWS, CLASSES = 2048, 8192  # 64 MiB of float32
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
SETTING = f"""
import crossent, torch.nn.functional as F
torch.manual_seed(0)
x = torch.randn({ROWS}, {CLASSES}, requires_grad=True)
t, several = torch.randint({CLASSES}, ({ROWS},)), torch.randint({CLASSES}, ({ROWS}, 4))
scale = torch.tensor(0.7, requires_grad=True)
factor = torch.rand({ROWS}, requires_grad=True)
"""


def units(name: str, expression: str) -> float:
    """The peak of one call and its backward, in units of the logits."""
    if name == "second derivative":
        run = (
            f"torch.autograd.grad({expression}, x, create_graph=True)[0].square().sum().backward()"
        )
    else:
        run = f"({expression}).backward()"
    return peak_memory(f"{SETTING}\ndef step():\n    {run}\n") * 2**20 / (4 * ROWS * CLASSES)


@click.command()
@click.option("--write", is_flag=True, help="Write the table into docs/performance.md.")
def main(write: bool) -> None:
    """Print the table."""
    lines = [
        [name, *(f"{units(name, expression):.1f}" for expression in both)]
        for name, both in CASES.items()
    ]
    title = f"peak memory / bytes of the logits ({ROWS} x {CLASSES} float32)"
    report([(title, ("forward and backward", "crossent", "torch"), lines)], MARK if write else None)


if __name__ == "__main__":
    main()
