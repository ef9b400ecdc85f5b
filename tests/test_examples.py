"""The examples run, agree with PyTorch, and write what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import crossent

EXAMPLES = Path(__file__).parents[1] / "examples"
EPOCHS = 3


def test_from_scratch_is_the_library_in_as_many_lines_as_the_readme_says(capsys):
    path = EXAMPLES / "from_scratch.py"
    spec = importlib.util.spec_from_file_location("from_scratch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    z, t = torch.randn(20, 7, dtype=torch.float64, requires_grad=True), torch.arange(20) % 7
    torch.testing.assert_close(module.cross_entropy(z, t), crossent.cross_entropy(z, t))
    (g,) = torch.autograd.grad(crossent.cross_entropy(z, t), z)
    torch.testing.assert_close(module.gradient(z.detach(), t), g)
    torch.testing.assert_close(module.softmax(z), crossent.softmax(z))
    module.main()
    assert "0.0000e+00 from scratch, 2.0612e-09 from the library" in capsys.readouterr().out
    lines = len(path.read_text().splitlines())
    for page in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        text = " ".join((EXAMPLES.parent / page).read_text().split())
        assert f"in {lines} lines" in text, page


class Demo(NamedTuple):
    printed: str
    logits: np.ndarray
    target: np.ndarray
    directory: Path


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses with postponed annotations look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def demo(digits, tmp_path_factory) -> Demo:
    directory = tmp_path_factory.mktemp("demo") / "made" / "here"
    arguments = ["--epochs", str(EPOCHS), "--output", str(directory)]
    result = CliRunner().invoke(digits.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    logits, target = (np.load(directory / f"digits-{n}.npy") for n in ("logits", "target"))
    return Demo(result.output, logits, target, directory)


@pytest.fixture(scope="module")
def runs(digits):
    data, model = digits.load(0), digits.network(0)
    losses = {"crossent": crossent.CrossEntropyLoss(), "PyTorch": F.cross_entropy}
    return [digits.train(n, f, model, data, range(EPOCHS), 0) for n, f in losses.items()]


def last_row(printed: str) -> list[float]:
    """The numbers of the loss table's last row, without the epoch."""
    rows = re.findall(rf"^ +{EPOCHS} +(0\.\d+ .*)$", printed, re.MULTILINE)
    assert len(rows) == 1, printed
    return [float(cell.rstrip("%")) for cell in rows[0].split()]


def test_names_both_losses_and_what_it_wrote(demo):
    assert "crossent" in demo.printed
    assert "PyTorch" in demo.printed
    for path in demo.directory.iterdir():
        assert path.name in demo.printed


@pytest.mark.parametrize("name", ["loss-curve.png", "gradient-of-one-row.png"])
def test_pictures_are_pictures(demo, name):
    content = (demo.directory / name).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 5000


def test_saved_arrays_fit_together(demo):
    assert demo.logits.shape == (450, 10)
    assert demo.logits.dtype == np.float32
    assert demo.target.shape == (450,)
    assert demo.target.dtype == np.int64


def test_saved_logits_have_the_printed_loss_and_accuracy(demo):
    _, _, mine, theirs, my_accuracy, their_accuracy = last_row(demo.printed)
    again = F.cross_entropy(torch.from_numpy(demo.logits), torch.from_numpy(demo.target)).item()
    assert mine == pytest.approx(again, abs=1e-6)
    assert theirs == pytest.approx(again, abs=1e-5)
    right = 100 * (demo.logits.argmax(1) == demo.target).mean()
    assert my_accuracy == pytest.approx(right, abs=0.006)
    assert their_accuracy == pytest.approx(right, abs=0.3)


def test_the_two_curves_agree(digits, runs):
    assert digits.largest_difference(*runs) < 1e-5
    assert len(runs[0].train_loss) == len(runs[0].test_loss) == EPOCHS


def test_printed_difference_is_that_of_the_curves(demo, digits, runs):
    said = re.search(r"largest difference .*: (\S+) nats", demo.printed)
    assert float(said[1]) == pytest.approx(digits.largest_difference(*runs), abs=1e-6)


def test_the_difference_sees_a_difference(digits, runs):
    other = digits.History("other", runs[0].train_loss, [v + 0.5 for v in runs[0].test_loss])
    assert digits.largest_difference(runs[0], other) == pytest.approx(0.5)


def test_training_learns_and_leaves_everything_else_alone(digits):
    data, model = digits.load(1), digits.network(1)
    before = [p.clone() for p in model.parameters()]
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    run = digits.train("crossent", crossent.CrossEntropyLoss(), model, data, range(EPOCHS), 1)
    assert run.test_loss[-1] < run.test_loss[0]
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_epoch_loss_counts_rows_not_batches(digits):
    """Without learning, the epoch's loss is the mean over all rows, the short batch included."""
    data, model = digits.load(0), digits.network(0)
    assert len(data.train_y) % digits.BATCH
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = digits.train_epoch(F.cross_entropy, model, still, data, torch.Generator())
    expected = F.cross_entropy(model(data.train_x), data.train_y).item()
    assert loss == pytest.approx(expected, rel=1e-6)


def test_easiest_and_worst_rows(digits):
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0], [9.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    assert digits.easiest_and_worst(logits, torch.zeros(5, dtype=torch.int64)) == [2, 0, 1, 3]


def test_language_model(tmp_path):
    """Every head trains the same model: the curves coincide, the files are there."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "language_model.py"), "--short", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = {run["name"]: run for run in json.loads((tmp_path / "language-model.json").read_text())}
    plain = runs["plain"]["losses"]
    assert plain[-1] < plain[0]
    for name in ("torch, chunked", "crossent"):
        if name in runs:
            assert runs[name]["losses"] == pytest.approx(plain, abs=1e-4)
    for name in ("crossent, bounded", "crossent, unbiased"):
        assert runs[name]["losses"] == pytest.approx(plain, abs=0.05)
    assert (tmp_path / "language-model.png").read_bytes()[:4] == b"\x89PNG"
    assert "test perplexity" in done.stdout


def test_lightning_accumulates_exactly():
    pytest.importorskip("lightning")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "lightning_accumulation.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(lines) == 4
    for line in lines:
        assert float(line[2]) == pytest.approx(float(line[6]), abs=2e-6)


def test_a_patched_step_takes_less_memory():
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "huggingface_memory.py"), "--steps", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert float(lines["patched"][2]) == pytest.approx(float(lines["plain"][2]), rel=1e-5)
    plain, patched = (int(lines[name][4]) for name in ("plain", "patched"))
    assert patched < plain / 2
