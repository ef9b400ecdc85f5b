"""`crossent explain`: files of every format, and what is bad about them in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import save_file

from crossent.cli import main


def test_tables_as_pandas_writes_them(tmp_path, digits):
    z, t = digits[0][:50], digits[1][:50]
    expected = F.cross_entropy(z, t).item()
    frame = pandas.DataFrame(z.numpy())
    frame.to_csv(tmp_path / "plain.csv", index=False)
    frame.to_csv(tmp_path / "index.csv")
    frame.to_csv(tmp_path / "bare.csv", index=False, header=False, encoding="utf-8-sig")
    frame.assign(target=t.numpy()).to_csv(tmp_path / "both.csv", index=False)
    np.save(tmp_path / "t.npy", t.numpy())
    np.savetxt(tmp_path / "t.csv", t.numpy(), fmt="%d")
    for names in ("plain.csv t.npy", "index.csv t.npy", "bare.csv t.csv", "both.csv both.csv"):
        done = command(*(tmp_path / name for name in names.split()), "--json", "-")
        assert done.exit_code == 0, (names, done.output)
        assert json.loads(done.stdout)["mean"] == pytest.approx(expected, rel=1e-5), names
        assert json.loads(done.stdout)["classes"] == 10


def test_tables_of_nullable_numbers(tmp_path, digits):
    z, t = digits[0][:50], digits[1][:50]
    frame = pandas.DataFrame(z.numpy(), columns=list("abcdefghij")).astype("Float32")
    frame.to_parquet(tmp_path / "z.parquet")
    pandas.DataFrame({"target": t.numpy()}).astype("Int64").to_parquet(tmp_path / "t.parquet")
    done = command(tmp_path / "z.parquet", tmp_path / "t.parquet", "--json", "-")
    assert done.exit_code == 0, done.output
    expected = F.cross_entropy(z, t).item()
    assert json.loads(done.stdout)["mean"] == pytest.approx(expected, rel=1e-5)


def test_broken_archives_are_bad_input(tmp_path):
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("empty.npz", "cut.npz", "none.npz"):
        done = command(tmp_path / name)
        assert done.exit_code == 2, done.output
        assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "names.txt").write_text("\ufeffa\x85b\nc\nd\n", encoding="utf-8")
    np.save(tmp_path / "z.npy", np.eye(3))
    np.save(tmp_path / "t.npy", np.arange(3))
    done = command(tmp_path / "z.npy", tmp_path / "t.npy", "--classes", tmp_path / "names.txt")
    assert done.exit_code == 0, done.output


@pytest.fixture
def files(tmp_path, digits):
    z, t = digits[0][:200], digits[1][:200]
    np.save(tmp_path / "z.npy", z.numpy())
    np.save(tmp_path / "t.npy", t.numpy())
    np.savez(tmp_path / "both.npz", logits=z.numpy(), labels=t.numpy())
    np.savetxt(tmp_path / "z.csv", z.numpy(), delimiter=",")
    (tmp_path / "t.csv").write_text("target\n" + "\n".join(map(str, t.tolist())))
    torch.save(z, tmp_path / "z.pt")
    torch.save({"logits": z, "target": t}, tmp_path / "both.pt")
    save_file({"logits": z, "labels": t}, tmp_path / "both.safetensors")
    frame = pandas.DataFrame(z.numpy(), columns=[f"digit {i}" for i in range(10)])
    frame.to_parquet(tmp_path / "z.parquet")
    pandas.DataFrame({"id": range(200), "target": t.numpy()}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "names.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    return tmp_path


def command(*arguments):
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


@pytest.mark.parametrize(
    "names",
    [
        ("z.npy", "t.npy"),
        ("both.npz",),
        ("z.csv", "t.csv"),
        ("z.pt", "t.npy"),
        ("both.pt", "both.pt"),
        ("both.safetensors", "both.safetensors"),
        ("z.parquet", "t.parquet"),
    ],
)
def test_command_line(files, names, digits):
    paths = [files / name for name in names]
    done = command(*paths, "--json", "-")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    expected = F.cross_entropy(digits[0][:200], digits[1][:200]).item()
    assert value["mean"] == pytest.approx(expected, rel=1e-5)
    shown = command(*paths, "--classes", files / "names.txt", "--top", 2)
    assert "digit" in shown.stdout
    assert "by class (2 of 10)" in shown.stdout


def test_command_line_bad_input(files):
    (files / "broken.npy").write_bytes(b"nonsense")
    np.save(files / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    torch.save(object, files / "pickled.pt")
    np.savez(files / "other.npz", a=np.zeros(2), b=np.zeros(2))
    (files / "z.txt").write_text("1")
    (files / "one.txt").write_text("one")
    t = files / "t.npy"
    for arguments, match in (
        ((files / "none.npy", t), "none.npy: no such file"),
        ((files / "z.npy",), "expected a second file"),
        ((files / "broken.npy", t), "broken.npy: cannot be read as .npy"),
        ((files / "pickled.npy", t), "never loaded"),
        ((files / "pickled.pt", t), "never loaded"),
        ((files / "other.npz", t), "expected an array named logits"),
        ((files / "z.txt", t), "expected one of .csv"),
        ((files / "t.npy", files / "z.npy"), "logits: expected shape"),
        ((files / "z.npy", files / "z.npy"), "target: expected class indices"),
        ((files / "z.npy", t, "--classes", files / "one.txt"), "classes: expected 10"),
    ):
        done = command(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert match in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_files_larger_than_the_memory_allowed(tmp_path):
    """900 MB of float16 logits within 1.5 GB of resident memory."""
    rows, classes = 7000, 64000
    mapped = np.lib.format.open_memmap(
        tmp_path / "z.npy", mode="w+", dtype=np.float16, shape=(rows, classes)
    )
    block = np.random.default_rng(0).normal(size=(100, classes)).astype(np.float16)
    for begin in range(0, rows, 100):
        mapped[begin : begin + 100] = block
    mapped.flush()
    del mapped
    np.save(tmp_path / "t.npy", np.arange(rows))
    code = (
        "import resource, sys\nfrom crossent.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('KIB', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "explain", tmp_path / "z.npy", tmp_path / "t.npy"],
        capture_output=True,
        text=True,
        check=True,
    )
    resident = int(done.stdout.rsplit("KIB", 1)[1])
    assert resident < 1.5 * 2**20
    assert "perplexity" in done.stdout
