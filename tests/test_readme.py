"""The README's examples run, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import crossent

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_example_runs_and_prints_the_steps(capsys):
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "3.5634" in printed
    assert "gradient" in printed
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 5


def test_patch_example_runs():
    called = []

    def train():
        called.append(torch.nn.functional.cross_entropy)

    exec(compile(BLOCKS[1], "README.md", "exec"), {"crossent": crossent, "train": train})
    assert called != [torch.nn.functional.cross_entropy]


def test_the_arguments_shown_are_the_arguments():
    import inspect

    shown = set(re.findall(r"(\w+)=", BLOCKS[2]))
    assert shown <= set(inspect.signature(crossent.cross_entropy).parameters)
    assert len(shown) > 10


def test_links_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), link


def test_names_in_backticks_with_our_prefix_exist():
    for name in re.findall(r"`crossent\.(\w+)", README):
        assert hasattr(crossent, name), name
