"""transformers models train through the fused head: same loss, same gradients, same everything."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.head.lazy import LazyLogits, scores
from crossent.integrations import huggingface
from tests.helpers.training import QUIETLY

transformers = pytest.importorskip("transformers")
V, T, B = 97, 11, 2
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
OPT = {"word_embed_proj_dim": 16, "ffn_dim": 24, "dropout": 0.0}
MODELS = {
    "Llama": SMALL,
    "Mistral": SMALL,
    "Qwen2": SMALL,
    "Gemma2": {**SMALL, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "Phi3": SMALL,
    "GPT2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPT": {**SMALL, **OPT},
    "GPTNeoX": {**SMALL, "rotary_pct": 0.5},
    "Mixtral": {**SMALL, "num_local_experts": 2, "output_router_logits": True},
}


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def model_of(name, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name], **more)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, kind)(config).train()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # away from equal probabilities
    return model


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (B, T), generator=g)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, batch, **more):
    """Loss, logits and all gradients."""
    model.zero_grad()
    torch.manual_seed(5)  # for dropout
    out = model(**batch, **more)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.logits, gradients


def assert_same(mine, its, rtol=1e-4):
    torch.testing.assert_close(mine[0], its[0], rtol=1e-5, atol=0)
    assert mine[2].keys() == its[2].keys()
    # Some are 0 but for rounding: a bias of keys moves all scores alike.
    noise = 1e-6 * max(float(gradient.abs().max()) for gradient in its[2].values())
    for name, gradient in its[2].items():
        atol = rtol * float(gradient.abs().max()) + noise
        torch.testing.assert_close(mine[2][name], gradient, rtol=rtol, atol=atol)


@pytest.fixture
def fused(monkeypatch):
    """How often a head's loss was computed without logits."""
    calls = []
    inner = scores.linear_cross_entropy

    def counted(*args, **kwargs):
        calls.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(scores, "linear_cross_entropy", counted)
    return calls


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", MODELS)
def test_same_loss_gradients_and_generation(name, tied, batch, fused):
    model = model_of(name, tie_word_embeddings=tied)
    before, before_items = step(model, batch), step(model, batch, num_items_in_batch=5)
    plain = model.eval()(**batch)
    ids = batch["input_ids"][:, :4]
    written = model.generate(ids, max_new_tokens=5, do_sample=False)
    model.train()
    keys = list(model.state_dict())
    with huggingface.patch(model):
        during = step(model, batch)
        assert len(fused) == 1, "the head was not fused"
        during_items = step(model, batch, num_items_in_batch=5)
        assert isinstance(during[1], LazyLogits)
        torch.testing.assert_close(during[1] + 0, before[1], rtol=1e-4, atol=1e-5)
        model.eval()
        out = model(**batch)
        assert type(out.logits) is torch.Tensor
        assert torch.equal(out.logits, plain.logits)
        torch.testing.assert_close(out.loss, plain.loss)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)
        model.train()
    assert_same(during, before)
    assert_same(during_items, before_items)
    assert list(model.state_dict()) == keys
    fused.clear()
    assert_same(step(model, batch), before, rtol=1e-6)
    assert not fused, "undone"
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_half_precision_and_autocast(batch):
    model = model_of("Llama").bfloat16()
    before = step(model, batch)
    with huggingface.patch(model):
        during = step(model, batch)
    assert during[0].dtype == before[0].dtype == torch.float32
    torch.testing.assert_close(during[0], before[0], rtol=1e-2, atol=0)
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        before = step(model, batch)
        with huggingface.patch(model):
            during = step(model, batch)
            assert during[1].dtype == before[1].dtype == torch.bfloat16
    torch.testing.assert_close(during[0], before[0], rtol=1e-2, atol=0)


def test_compiled_models(batch):
    model = model_of("Llama")
    before = step(model, batch)
    huggingface.patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    during = step(compiled, batch)
    its = {f"_orig_mod.{name}": g for name, g in before[2].items()}
    assert_same(during, (before[0], None, its))
    huggingface.unpatch(compiled)
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_saved_and_loaded_as_ever(batch, tmp_path):
    model = model_of("Llama")
    huggingface.patch(model)
    before = step(model, batch)
    copied = copy.deepcopy(model)
    assert_same(step(copied, batch), before)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert type(loaded.get_output_embeddings()) is torch.nn.Linear
    assert_same(step(loaded, batch), before)


def test_adapters_of_peft(batch, fused):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(model_of("Llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = step(model, batch)
    with huggingface.patch(model):
        assert_same(step(model, batch), before)
        assert len(fused) == 1


def test_masked_language_models(batch, fused):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForMaskedLM(config).train()
    before = step(model, batch)
    with huggingface.patch(model):
        assert_same(step(model, batch), before)
    assert len(fused) == 1


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_classification(kind, batch):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=5)
    model = getattr(transformers, f"LlamaFor{kind}Classification")(config).train()
    labels = torch.tensor([3, 1]) if kind == "Sequence" else torch.randint(0, 5, (B, T))
    given = {"input_ids": batch["input_ids"], "labels": labels}
    before, seen = step(model, given), []
    patched = huggingface.patched_loss
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(huggingface, "patched_loss", lambda: seen.append(1) or patched())
        with huggingface.patch(model):
            assert_same(step(model, given), before)
    assert seen, "the loss was not ours"


def trainer(model, directory, rows, batch_size, accumulate, **more):
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        gradient_accumulation_steps=accumulate,
        learning_rate=0.1,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **QUIETLY | {"per_device_train_batch_size": batch_size},
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, **more)


@pytest.mark.parametrize("own_loss", [False, True], ids=["models", "compute_loss"])
def test_accumulation_is_one_large_batch(own_loss, tmp_path):
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (8, T), generator=g)
    rows = [{"input_ids": i, "labels": i.clone()} for i in ids]
    for n, row in enumerate(rows):
        row["labels"][: n + 1] = -100  # batches that count differently
    ended = {}
    more = {"compute_loss_func": huggingface.compute_loss} if own_loss else {}
    for patched, size, accumulate in ((False, 8, 1), (True, 8, 1), (True, 2, 4)):
        model = model_of("Llama")
        if patched:
            huggingface.patch(model)
        kwargs = more if patched else {}
        trainer(model, tmp_path, rows, size, accumulate, **kwargs).train()
        ended[patched, size] = {k: v.clone() for k, v in model.state_dict().items()}
    for key in ((True, 8), (True, 2)):
        for name, value in ended[False, 8].items():
            torch.testing.assert_close(ended[key][name], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_served_is_said():
    with pytest.raises(TypeError, match="expected a transformers"):
        huggingface.patch(torch.nn.Linear(2, 3))
    model = model_of("Llama")
    huggingface.patch(model)
    with pytest.raises(RuntimeError, match="patched already"):
        huggingface.patch(model)
    huggingface.unpatch(model)
    huggingface.unpatch(model)
    model.lm_head = torch.nn.Bilinear(2, 3, 4)
    with pytest.raises(TypeError, match="got Bilinear"):
        huggingface.patch(model)
    assert F.cross_entropy is not crossent.patching.cross_entropy
