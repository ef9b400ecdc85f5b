"""What an explanation costs beside the loss, and how well it finds wrong labels beside cleanlab.

Usage: python benchmarks/explain.py [--write]
"""

from __future__ import annotations

import click
import numpy as np
import torch
from harness import alternate, report
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

import crossent

MARK = "<!-- table: benchmarks/explain.py --write -->"
SHAPES = ((65536, 10), (65536, 1000), (1024, 128256))
FLIPPED = 0.05  # of the labels
SEEDS = 5


def times() -> list[list[str]]:
    """Milliseconds of an explanation beside one forward pass of the loss."""
    lines = []
    for shape in SHAPES:
        z, t = torch.randn(shape), torch.randint(0, shape[1], shape[:1])
        found = alternate(
            {
                "loss": lambda z=z, t=t: crossent.cross_entropy(z, t),
                "explain": lambda z=z, t=t: crossent.explain(z, t),
            },
            seconds=2.0,
        )
        ratio = found["explain"].median / found["loss"].median
        label = " x ".join(map(str, shape))
        lines.append([label, str(found["loss"]), str(found["explain"]), f"{ratio:.1f}"])
    return lines


def labels() -> list[list[str]]:
    """Precision and recall of wrong labels on digits, some of them flipped; means over seeds."""
    from cleanlab.filter import find_label_issues

    x, y = load_digits(return_X_y=True)
    lines = []
    for strength in (0.01, 0.05, 1.0, 100.0):
        found: dict[str, list[tuple[float, float]]] = {"crossent": [], "cleanlab": []}
        for seed in range(SEEDS):
            random = np.random.default_rng(seed)
            flipped = random.permutation(len(y))[: int(FLIPPED * len(y))]
            given = y.copy()
            given[flipped] = (given[flipped] + random.integers(1, 10, len(flipped))) % 10
            model = LogisticRegression(C=strength, max_iter=1000)
            p = cross_val_predict(model, x / 16, given, cv=5, method="predict_proba").clip(1e-30)
            why = crossent.explain(torch.tensor(np.log(p)), torch.tensor(given))
            ours = next((s.rows for s in why.findings if s.kind == "wrong labels"), [])
            theirs = np.nonzero(find_label_issues(given, p, n_jobs=1))[0].tolist()
            for name, rows in (("crossent", ours), ("cleanlab", theirs)):
                found[name].append(score(set(rows), set(flipped.tolist())))
        means = [np.mean(values, axis=0) for values in found.values()]
        lines.append([f"{strength:g}", *(f"{v:.3f}" for mean in means for v in mean)])
    return lines


def score(named: set[int], wrong: set[int]) -> tuple[float, float]:
    """Precision and recall."""
    hit = len(named & wrong)
    return hit / max(1, len(named)), hit / len(wrong)


@click.command()
@click.option("--write", is_flag=True, help="Write the tables into docs/performance.md.")
def main(write: bool) -> None:
    """Time explanations, and count the wrong labels that they find."""
    headings = ("logits", "loss, ms", "explain, ms", "ratio")
    parts = [("an explanation beside one forward pass of the loss", headings, times())]
    try:
        title = (
            f"wrong labels found on digits with {FLIPPED:.0%} of them flipped, out of sample, "
            f"means of {SEEDS} seeds"
        )
        columns = ("regularisation C", "precision", "recall", "cleanlab's precision", "recall")
        parts.append((title, columns, labels()))
    except ImportError:
        print("cleanlab is not installed: make bench installs it")
    report(parts, MARK if write else None)


if __name__ == "__main__":
    main()
