"""Metrics of torchmetrics: exact sums over batches, casts, collections and processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import crossent

pytestmark = pytest.mark.filterwarnings("ignore")


def batches(n=6):
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        z, t = (
            3 * torch.randn(2 + i, 4, 7, generator=g),
            torch.randint(0, 7, (2 + i, 4), generator=g),
        )
        t[0, : i % 4] = -100
        yield z, t


def test_metrics_add_up_whatever_the_batches():
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy, Perplexity

    made = [CrossEntropy(), Perplexity(), CalibrationError(), CrossEntropy(torch.arange(1.0, 8))]
    for z, t in batches():
        for metric in made:
            metric.update(z, t)
    z, t = (torch.cat([x.flatten(0, 1) for x in part]) for part in zip(*batches(), strict=True))
    why = crossent.explain(z, t)
    assert made[0].compute().item() == pytest.approx(why.mean, rel=1e-6)
    assert made[1].compute().item() == pytest.approx(why.perplexity, rel=1e-6)
    assert made[2].compute().item() == pytest.approx(why.ece, rel=1e-6)
    weighted = F.cross_entropy(z.double(), t, torch.arange(1.0, 8).double()).item()
    assert made[3].compute().item() == pytest.approx(weighted, rel=1e-6)
    made[0].reset()
    assert made[0].compute().isnan()
    with pytest.raises(ValueError, match="bins"):
        CalibrationError(bins=0)


def casts():
    from torch import bfloat16, float16

    return {
        "to": lambda m: m.to(bfloat16),
        "to float16": lambda m: m.to("cpu", float16),
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "float": lambda m: m.float(),
        "type": lambda m: m.type(float16),
        "set_dtype": lambda m: [metric.set_dtype(bfloat16) for metric in m],
        "share": lambda m: m.share_memory(),
    }


@pytest.mark.parametrize("cast", casts())
def test_sums_stay_exact_whatever_the_module_is_cast_to(cast):
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy, Perplexity

    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    made = torch.nn.ModuleList([CrossEntropy(), CrossEntropy(weight), Perplexity()])
    made.append(CalibrationError())
    plain = [type(m)() for m in made]
    plain[1] = CrossEntropy(weight.clone())
    for z, t in batches():
        for metric, other in zip(made, plain, strict=True):
            metric.update(z, t)
            other.update(z, t)
        casts()[cast](made)
        assert [m.compute().item() for m in made] == [m.compute().item() for m in plain]
    for metric in made:
        state = next(iter(metric._defaults))
        metric.reset()
        assert getattr(metric, state).dtype == torch.float64
        assert metric.dtype == metric.compute().dtype == torch.float64
    assert torch.equal(made[1].weight, weight)


def test_metrics_in_a_bfloat16_module_of_lightning():
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CrossEntropy

    rows = torch.utils.data.TensorDataset(torch.randn(640, 8), torch.randint(0, 300, (640,)))

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.head, self.metric, self.seen = torch.nn.Linear(8, 300), CrossEntropy(), []

        def test_step(self, batch, *_):
            z = self.head(batch[0])
            self.seen.append((z.detach(), batch[1]))
            self.metric.update(z, batch[1])
            self.log("loss", self.metric)

        def on_test_epoch_end(self):
            self.value = self.metric.compute().item()

    model = Model()
    trainer = lightning.Trainer(
        precision="bf16-true", accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.test(model, torch.utils.data.DataLoader(rows, 16), verbose=False)
    z, t = (torch.cat(part) for part in zip(*model.seen, strict=True))
    assert z.dtype == torch.bfloat16
    truth = F.cross_entropy(z.double(), t).item()
    assert model.value == pytest.approx(truth, rel=1e-6)


def test_a_metric_made_without_storage_starts_at_nothing():
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy

    z, t = next(batches())
    for kind in (CrossEntropy, CalibrationError):
        with torch.device("meta"):
            module = torch.nn.ModuleList([kind()])
        made, plain = module.to_empty(device="cpu")[0], kind()
        for _ in range(2):
            made.update(z, t)
            plain.update(z, t)
            assert made.compute() == plain.compute()
            made.reset()
            plain.reset()
    with torch.device("meta"), pytest.raises(TypeError, match="weight: expected numbers"):
        CrossEntropy(torch.ones(7))


def test_a_collection_shares_sums_of_equal_options_only():
    torchmetrics = pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy, Perplexity

    def made():
        return {
            "plain": CrossEntropy(),
            "perplexity": Perplexity(),
            "smoothed": CrossEntropy(options={"label_smoothing": 0.1}),
            "ignoring": CrossEntropy(options={"ignore_index": 3}),
            "warmer": CrossEntropy(options={"logit_scale": 0.5}),
            "weighted": CrossEntropy(torch.ones(7)),
            "heavier": CrossEntropy(torch.arange(1.0, 8)),
            "error": CalibrationError(),
            "error ignoring": CalibrationError(ignore_index=3),
            "finer": CalibrationError(bins=30),
        }

    together, alone = torchmetrics.MetricCollection(made()), made()
    flat = (torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64))  # all of them see the same there
    for z, t in (flat, *((z.flatten(0, 1), t.flatten()) for z, t in batches())):
        t = t.masked_fill(t == -100, 0)
        together.update(z, t)
        for metric in alone.values():
            metric.update(z, t)
    assert {k: v.item() for k, v in together.compute().items()} == {
        k: m.compute().item() for k, m in alone.items()
    }
    assert ["perplexity", "plain"] in together.compute_groups.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_that_are_no_numbers_do_not_count_in_the_calibration_error(dtype):
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError

    z, t = 3 * torch.randn(20, 6).to(dtype), torch.randint(0, 6, (20,))
    z[3], z[4, 2], z[5], z[6, t[6]] = torch.nan, torch.nan, torch.inf, -torch.inf
    kept = [i for i in range(20) if i not in (3, 4, 5, 6)]
    metric, clean = CalibrationError(), CalibrationError()
    metric.update(z, t)
    clean.update(z[kept], t[kept])
    assert metric.compute() == clean.compute()
    assert crossent.explain(z, t).ece == metric.compute()
    metric.reset()
    metric.update(z[3:6], t[3:6])
    assert metric.compute().isnan()


PROCESS = """
import os, sys
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], GLOO_SOCKET_IFNAME="lo")
import torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2)
from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy, Perplexity
made = torch.nn.ModuleList([CrossEntropy(), Perplexity(), CalibrationError()]).bfloat16()
alone = [type(metric)(sync_on_compute=False) for metric in made]
g = torch.Generator().manual_seed(0)
z, t = torch.randn(10, 5, generator=g), torch.randint(0, 5, (10,), generator=g)
part = slice(0, 3) if rank == 0 else slice(3, 10)
for metric, whole in zip(made, alone):
    metric.update(z[part], t[part])
    whole.update(z, t)
    print(metric.compute().item(), whole.compute().item())
print(made[0].compute().item(), torch.nn.functional.cross_entropy(z.double(), t).item())
dist.destroy_process_group()
"""


def test_metrics_add_up_over_processes():
    pytest.importorskip("torchmetrics")
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    run = [sys.executable, "-W", "ignore", "-c", PROCESS]
    both = [
        subprocess.Popen([*run, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in both:
        out = process.communicate(timeout=120)[0]
        assert len(out.splitlines()) == 4
        for line in out.splitlines():
            mine, truth = (float(v) for v in line.split())
            assert mine == pytest.approx(truth, rel=1e-6)
