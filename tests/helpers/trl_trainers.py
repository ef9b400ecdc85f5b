"""Small trainers of TRL, and what a step or a run of them gives."""

from __future__ import annotations

import pytest
import torch

from crossent.head import chunked
from tests.helpers.training import QUIETLY

trl = pytest.importorskip("trl")
kernels = pytest.importorskip("trl.kernels")
if not hasattr(kernels, "ChunkedLogProbFunction"):
    pytest.skip("this TRL has no fused head", allow_module_level=True)
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
V = 97
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLOCKS = ("time", "runtime", "per_second", "flos")


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(3, V)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    found.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that hold a model each: TRL loads reference models by their names."""
    folders = {}
    for cap in (None, 5.0):
        torch.manual_seed(0)
        if cap is None:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
        else:
            more = {"final_logit_softcapping": cap, "query_pre_attn_scalar": 8}
            model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, **more))
        for parameter in model.parameters():
            parameter.data.mul_(3)
        folders[cap] = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(folders[cap])
    return folders


def words(count, seed):
    g = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, V, (count,), generator=g).tolist())


def rows(name):
    prompts = [{"prompt": words(4, i)} for i in range(4)]
    more = {
        "SFT": lambda i: {"completion": words(6, 100 + i)},
        "DPO": lambda i: {"chosen": words(6, 100 + i), "rejected": words(5, 200 + i)},
        "KTO": lambda i: {"completion": words(6, 100 + i), "label": bool(i % 2)},
        "Reward": lambda i: {"chosen": words(6, 100 + i), "rejected": words(5, 200 + i)},
    }.get(name, lambda i: {})
    return datasets.Dataset.from_list([row | more(i) for i, row in enumerate(prompts)])


def reward(completions, **_):
    return [float(len(set(c.split()))) + 0.1 * len(c) for c in completions]


@pytest.fixture
def make(tokenizer, saved, tmp_path):
    """A trainer by name, the same each time."""

    def build(name, cap=None, model=None, peft=None, **more):
        torch.manual_seed(3)
        if name in ("GRPO", "RLOO"):
            more = {"num_generations": 2, "max_completion_length": 6, **more}
        if model is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                saved[cap], attn_implementation="eager"
            )
        args = getattr(trl, f"{name}Config")(
            output_dir=str(tmp_path),
            learning_rate=0.01,
            logging_steps=1,
            seed=1,
            gradient_checkpointing=False,
            **QUIETLY | {"bf16": False} | more,
        )
        keywords = {"args": args, "train_dataset": rows(name), "processing_class": tokenizer}
        if peft is not None:
            keywords["peft_config"] = peft
        if name in ("GRPO", "RLOO"):
            keywords["reward_funcs"] = reward
        trainer = getattr(trl, f"{name}Trainer")(model, **keywords)
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return build


@pytest.fixture
def rows_scored(monkeypatch):
    """How many rows each chunked pass of ours goes through."""
    seen, original = [], chunked._Work.__init__

    def spy(work, head, plan, rows, *more, **keywords):
        seen.append((rows, head.input.shape[0]))
        original(work, head, plan, rows, *more, **keywords)

    monkeypatch.setattr(chunked._Work, "__init__", spy)
    return seen


def train(trainer):
    """Weights and logged numbers after the steps."""
    torch.manual_seed(4)
    trainer.train()
    logs = [
        {
            k: v
            for k, v in log.items()
            if isinstance(v, float) and not any(clock in k for clock in CLOCKS)
        }
        for log in trainer.state.log_history
    ]
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}, logs


def assert_same_run(found, expected, tolerance):
    weights, logs = found
    for name, value in expected[0].items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance)
    assert len(logs) == len(expected[1])
    for log, truth in zip(logs, expected[1], strict=True):
        assert log == pytest.approx(truth, rel=100 * tolerance, abs=100 * tolerance, nan_ok=True)


def tokens():
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(6))
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    return {"input_ids": ids, "labels": labels, "fused_lm_head": True}


def step(model):
    """What a model says of its tokens, and a gradient that has all of it."""
    model.zero_grad()
    out = model(**tokens())
    loss = (out.log_probs * torch.linspace(1, 2, 8)).sum()
    if out.entropy is not None and out.entropy.requires_grad:
        loss = loss + out.entropy.square().sum()
    loss.backward()
    return out, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected):
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
