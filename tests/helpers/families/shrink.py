"""Any configuration of transformers made tiny: attributes are known by their names."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

V = 109  # classes: no other dimension has this number
D = 64  # features
FIRST_WORD = 64  # ids of text begin here; below are those with a meaning (padding, images, ...)

# The first pattern that matches the whole name decides. None: leave it out, to be derived anew.
RULES: list[tuple[str, Any]] = [
    (r"layer_types|mlp_layer_types|.*layers_block_type|indexer_types|attention_layers", None),
    (r"no_rope_layers|activation_sparsity_pattern|moe_layers|layer_rope_theta", None),
    (r"rope_scaling_layers|kv_source_layers|full_attn_idxs|ple_layer_ids|attn_layers", None),
    (r"num_attention_heads_per_layer|_heterogeneity_spec|per_layer_config|hybrid_layer_ids", None),
    (r"(unpadded_|decoder_|src_|tgt_|text_)?vocab_size(_per_layer_input)?", V),
    (r"n?um?_?kv_shared_layers|.*nextn_predict_layers|num_mtp_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", 1),
    (r"(.*_)?(hidden_)?layers|n_layers?|(.*_)?num_(.*_)?layers|depth|num_blocks", 2),
    (r"resampler_depth|num_hidden_groups", 1),
    (r"num_layers_per_stack|n_recurrent_layers|n_(in|out)put_layers", 2),
    (r".*key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
    (r"linear_num_key_heads|linear_num_value_heads|linear_num_heads|index_n_heads", 4),
    (r"mamba_n(um)?_heads|n_mamba_heads", 4),
    (r"(.*_)?(attention_)?heads|n_heads?|(.*_)?n_heads", 4),
    (r"qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"(.*_)?head_dim|d_kv|d_head|dim_head|attention_head_size|kv_channels|mamba_d_head", 16),
    (r"mamba_headdim|resampler_dim_head", 16),
    (r"(.*_)?lora_rank|embedding_rank|laurel_rank|loop_gate_rank|hc_lowrank|adapter_rank", 16),
    (r"time_step_rank|mamba_dt_rank|d_rel|gated_norm_rank|intra_bottleneck_size", 16),
    (r"ssm_state_size|state_size|mamba_d_state", 16),
    (r"moe_num_shared_experts|n(um)?_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group|mamba_n_?groups|o_groups", 1),
    (r"n_groups", 2),
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k|moe_k", 2),
    (r"(.*_)?n(um)?_(local_|routed_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"(.*_)?(intermediate|ffn_hidden|feed_forward|ffn)_(size|dim)(_mlp)?|d_ff|dff|ffn_dim", 96),
    (
        r"(.*_)?ffn_dim|mlp_dim|dim_ff|n_inner|d_inner|share_expert_dim|intermediate_multiple_size",
        96,
    ),
    (r"hidden_size_per_layer_input", 16),
    (r"(.*_)?hidden_size(_global)?|d_model|n_embd|dim|hidden_dim|lru_width|d_latents", D),
    (r"(.*_)?(embed|embedding|emb|projection|output|pooler_output)_(dim|size)", D),
    (r"word_embed_proj_dim|true_hidden_size|enc_dim|.*_out_dim|adapter_in(put)?_(dim|size)", D),
    (r"dim_model_base", 32),
    (r"codevector_dim|proj_codevector_dim|classifier_proj_size|codebook_dim", 32),
    (r"max_2d_position_embeddings", 128),
    (r"max_(source|target|text|speech|encoder|decoder)?_?position(_embedding)?s", 256),
    (r"rotary_dim", 8),
    (r"n_positions|n_ctx|max_seq_len|max_pos_emb|context_length|position_embedding_size", 256),
    (r"relative_attention_max_distance", 32),
    (r"num_mel_bins|n_mel_bins|input_feat_per_channel", 16),
    (r"image_size|max_image_size|crop_size", 32),
    (r"patch_size|spatial_patch_size", 8),
    (r"(.*_)?(num_query_tokens|num_latents|n_latents|latent_query_num|num_image_tokens)", 8),
    (r"index_topk", 16),
    (r"conv_dim", [32] * 7),
    (r".*_vocab_size", 40),
    (r"initializer_range|init_std", 0.15),
]
COMPILED = [(re.compile(pattern), value) for pattern, value in RULES]
OFF = re.compile(r".*(dropout|pdrop|layerdrop|drop_path|jitter|mask_time_prob|mask_feature_prob).*")
TOKEN = re.compile(r".*token_(id|index)|.*_token|.*_id|.*token_ids")
KEPT = ("type_vocab_size", "task_type_vocab_size")


class Tokens:
    """New numbers for tokens with a meaning: the same number for the same token everywhere."""

    def __init__(self) -> None:
        self.new: dict[int, int] = {}

    def __call__(self, old: int) -> int:
        """A number below FIRST_WORD."""
        if old < 3:
            return old
        return self.new.setdefault(old, 3 + len(self.new))


def shrunk(config: PreTrainedConfig, tokens: Tokens, table: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make the same configuration tiny; ``table`` has the last word."""
    given: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(config)}  # the rest is derived from these
    for name, value in vars(config).items():
        if name not in fields:
            continue
        if isinstance(value, PreTrainedConfig):
            inner = shrunk(value, tokens, table.get(name, {}))
            given[name] = {"model_type": value.model_type, **_unlike_default(value), **inner}
            continue
        new = _value(name, value, tokens)
        if re.fullmatch(r".*key_value_heads", name) and value == _heads(config, name):
            new = 4  # as many as there are queries
        if new is not value:
            given[name] = new
    for name, value in table.items():
        if not isinstance(vars(config).get(name), PreTrainedConfig):
            given[name] = value
    return given


def _unlike_default(config: PreTrainedConfig) -> dict[str, Any]:
    """What the outer configuration asks of an inner one beside the inner one's own defaults."""
    plain = type(config)()
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if isinstance(value := vars(config).get(field.name), (int, float, str))
        and value != vars(plain).get(field.name)
    }


def _heads(config: PreTrainedConfig, name: str) -> Any:
    """How many heads of queries belong to a number of heads of keys and values."""
    return vars(config).get(name.replace("key_value", "attention"))


def _value(name: str, value: Any, tokens: Tokens) -> Any:
    """What becomes of one attribute; the same object where nothing does."""
    if name == "use_cache":  # caches of linear attention alone have no length
        return False
    if name == "head_dim" and value is None:
        return D // 4
    if isinstance(value, bool) or value is None or name in KEPT:
        return value
    if OFF.fullmatch(name) and isinstance(value, (int, float)):
        return type(value)(0)
    if TOKEN.fullmatch(name):
        if isinstance(value, int):
            return tokens(value)
        if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            return [tokens(v) for v in value]
    if name.startswith("rope_") and isinstance(value, dict):
        return _rope(value)
    for pattern, new in COMPILED:
        if pattern.fullmatch(name):
            if isinstance(new, (int, float)) and not isinstance(value, (int, float)):
                return value
            if isinstance(new, int) and isinstance(value, int) and value < new != V:
                return value
            return value if new is None else new
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary embedding sum to half of the dimensions that are turned."""
    inner = {k: _rope(v) if isinstance(v, dict) else v for k, v in value.items()}
    if "mrope_section" in inner:
        half = int(8 * inner.get("partial_rotary_factor", 1.0))
        inner["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return inner


def small_config(kind: type[PreTrainedConfig], table: dict[str, Any]) -> PreTrainedConfig:
    """A tiny configuration of a class."""
    return kind(**shrunk(kind(), Tokens(), table))
