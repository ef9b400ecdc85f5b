"""What some families need beside the general rules: of each, the least that makes it train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from torch import nn

from .inputs import B, T, words
from .listing import Family
from .shrink import D, V, small_config
from .special_inputs import (
    BOXES,
    FRAMES,
    PIXELS,
    PLAIN,
    SOUND,
    codes,
    double_heads,
    flava,
    given,
    idefics,
    kosmos,
    noise,
    patches,
    pretraining,
    queries,
    roc_bert,
    video_queries,
    vision_start,
    visual,
)


def _nothing(model: nn.Module) -> dict[str, Any]:
    return {}


class Special(NamedTuple):
    """Attributes of the configuration, inputs of the step, changes of the built model."""

    attributes: dict[str, Any] = {}  # noqa: RUF012
    inputs: Callable[[nn.Module], dict[str, Any]] = _nothing
    config: Callable[[], Any] | None = None
    built: Callable[[Any], Any] = lambda model: None


def _classes(kind: type, attributes: dict[str, Any] | None = None) -> Any:
    return small_config(kind, attributes or {})


def _vision_text() -> Any:
    encoder, decoder = _classes(transformers.ViTConfig), _classes(transformers.GPT2Config)
    both = transformers.VisionEncoderDecoderConfig
    return both.from_encoder_decoder_configs(encoder, decoder)


def _speech_text() -> Any:
    encoder, decoder = _classes(transformers.Wav2Vec2Config), _classes(transformers.GPT2Config)
    both = transformers.SpeechEncoderDecoderConfig
    return both.from_encoder_decoder_configs(encoder, decoder)


def _text_text() -> Any:
    encoder, decoder = _classes(transformers.BertConfig), _classes(transformers.BertConfig)
    both = transformers.EncoderDecoderConfig
    return both.from_encoder_decoder_configs(encoder, decoder)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}
SECTIONS = Special({"text_config": MROPE})
MAMBA = {"mamba_n_heads": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_local_experts": 4}

BOOK = {f"IMGIMG{chr(65 + i)}Z": 10 + i for i in range(8)}
VISUAL = {f"<|visual token {i:06d}|>": 10 + i for i in range(8)}


TABLE: dict[str, Special] = {
    # Causal models of text.
    "bamba": Special(MAMBA),
    "granitemoehybrid": Special(MAMBA),
    "mamba2": Special({"num_heads": 8}),
    "dbrx": Special(
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "deepseek_v2": Special({"num_experts_per_tok": 2}),
    "dots1": Special({**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1}),
    "blt": Special(
        {
            "encoder_hash_byte_group_vocab": 50,
            "encoder_hash_byte_group_size": [3],
            "patcher_config": {"vocab_size": 120},  # it has logits of its own
        }
    ),
    "dory": Special({"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1}),
    "gpt_neo": Special({"attention_types": [[["global", "local"], 1]]}),
    "lfm2_moe": Special({"layer_types": ["full_attention", "conv"]}),
    "longcat_flash": Special({"head_dim": 8, "qk_head_dim": 16}),
    "nemotron": Special({"num_key_value_heads": 2}),
    "reformer": Special(
        {
            "axial_pos_embds_dim": [16, 48],
            "axial_pos_shape": [8, 8],
            "attn_layers": ["local", "lsh"],
            "hash_seed": 0,
            "num_buckets": 4,
            "lsh_attn_chunk_length": 8,
            "local_attn_chunk_length": 8,
        },
        lambda model: {
            "input_ids": words(B, 64),
            "labels": words(B, 64),
            "attention_mask": None,
        },
    ),
    "ReformerForMaskedLM": Special(),
    "xmod": Special({"default_language": "en_XX"}),
    "zamba": Special(
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "attention_hidden_size": 2 * D,
            "attention_head_dim": D // 2,
        }
    ),
    "zamba2": Special({"layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1}),
    "gemma4_assistant": Special(
        {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    ),
    "cohere_compass_text": Special(
        {
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"full_attention": {**ROPE, "mrope_section": [4, 2, 2]}},
        }
    ),
    "MusicgenForCausalLM": Special({}, codes),
    "MusicgenMelodyForCausalLM": Special({}, codes),
    # Images.
    "git": Special({}, given(pixel_values=PIXELS)),
    "blip": Special({}, given(pixel_values=PIXELS)),
    "vision-encoder-decoder": Special(config=_vision_text, inputs=given(pixel_values=PIXELS)),
    "encoder-decoder": Special(config=_text_text),
    "pix2struct": Special({}, patches),
    "udop": Special({}, given(bbox=BOXES / 1000)),
    "vilt": Special({"max_position_embeddings": 64}, given(pixel_values=PIXELS)),
    "layoutlm": Special({}, given(bbox=BOXES)),
    "glm46v": SECTIONS,
    "glm4v": SECTIONS,
    "glmga": SECTIONS,
    "glm_ocr": SECTIONS,
    "glm4v_moe": Special(
        {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}}
    ),
    "paddleocr_vl": SECTIONS,
    "qwen2_vl": SECTIONS,
    "qwen2_5_vl": SECTIONS,
    "hunyuan_vl": SECTIONS,
    "hy_v4_vl": Special({"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}}),
    "ernie4_5_vl_moe": Special(
        {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}}
    ),
    "molmo2": Special(
        {"adapter_config": {"vision_feature_layer": [1, 0]}}, given(mm_token_type_ids=PLAIN)
    ),
    "chameleon": Special({"vocabulary_map": {"<image>": 4, **BOOK}}),
    "emu3": Special({"vocabulary_map": {"<image>": 4, **VISUAL}}),
    "cohere_compass": Special(
        {
            "text_config": {
                "layer_types": ["full_attention"] * 2,
                "rope_parameters": {"full_attention": {**ROPE, "mrope_section": [4, 2, 2]}},
            }
        }
    ),
    "deepseek_ocr2": Special(
        {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}}
    ),
    "diffusion_gemma": Special(
        {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}}
    ),
    "qwen2_5_omni_thinker": Special({"text_config": MROPE}, built=vision_start),
    "qwen3_omni_moe_thinker": Special({"text_config": MROPE}, built=vision_start),
    "pp_formulanet": Special(
        {}, given(pixel_values=PIXELS, input_ids=None, decoder_input_ids=words())
    ),
    "blip-2": Special({"image_token_index": 5}, queries),
    "instructblip": Special({"image_token_index": 5}, queries),
    "idefics": Special({}, idefics),
    "granite4_vision": Special(
        {
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [1],
            "downsample_rate": "1/2",
        }
    ),
    "apertus1p5": Special(
        {
            "image_token_offset": 8,
            "vision_config": {"codebook_size": 16},
            "audio_token_offset": 24,
            "audio_config": {"codebook_dim": D, "codebook_size": 16},
        }
    ),
    "step3p7": Special({"text_config": {"sliding_window": 16}}),
    "muse_spark": Special(
        {"audio_config": {"patch_sizes": [4, 2], "hidden_sizes": [32, 64], "depths": [1, 1]}}
    ),
    "nemotron_h_omni": Special({"vision_config": {"video_temporal_patch_size": 2}}),
    "kosmos-2": Special({}, kosmos),
    "paligemma": Special({}, given(token_type_ids=PLAIN + 1, attention_mask=None)),
    "lxmert": Special(
        {"visual_feat_dim": 32, "num_object_labels": 7, "num_attr_labels": 7},
        given(visual_feats=noise(B, 5, 32), visual_pos=noise(B, 5, 4)),
    ),
    "visual_bert": Special({"visual_embedding_dim": 32}, visual),
    # Sound.
    "whisper": Special({}, given(input_features=noise(B, 16, 512))),
    "speech_to_text": Special(
        {"conv_channels": 32}, given(input_features=FRAMES, attention_mask=None)
    ),
    "moonshine": Special({}, given(input_values=SOUND, input_ids=None, attention_mask=None)),
    "speech-encoder-decoder": Special(
        config=_speech_text, inputs=given(input_values=SOUND, attention_mask=None)
    ),
    "speecht5": Special({}, given(input_values=SOUND, attention_mask=None)),
    "canary": Special({}, given(input_features=FRAMES, attention_mask=None)),
    "cohere_asr": Special({}, given(input_features=FRAMES, attention_mask=None)),
    "voxtral_realtime": Special({}, given(input_features=noise(B, 16, 8 * T))),
    "moonshine_streaming": Special(
        {"num_key_value_heads": 4}, given(input_values=SOUND, attention_mask=None)
    ),
    "kyutai_speech_to_text": Special(
        {"codec_config": {"upsample_groups": D}},
        given(input_ids=words()[..., None].expand(B, T, 33) % 40),
    ),
    "dia": Special(
        {}, given(decoder_input_ids=words(B, T)[..., None].expand(B, T, 9), labels=words(9 * B))
    ),
    "InstructBlipVideoForConditionalGeneration": Special({"video_token_index": 5}, video_queries),
    "fun_asr_nano": Special({"adaptor_config": {"intermediate_size": 16}}),
    "SeamlessM4TForSpeechToText": Special(
        {}, given(input_features=noise(B, 64, 160), attention_mask=None)
    ),
    "SeamlessM4Tv2ForSpeechToText": Special(
        {}, given(input_features=noise(B, 64, 160), attention_mask=None)
    ),
    # Masked models and those of pretraining.
    "esm": Special({"vocab_size": V, "mask_token_id": 3}),
    "esmc": Special({"vocab_size": V}),
    "mobilebert": Special({"intra_bottleneck_size": D, "true_hidden_size": D}),
    "led": Special(
        {
            "max_encoder_position_embeddings": 256,
            "max_decoder_position_embeddings": 256,
            "attention_window": 8,
        }
    ),
    "perceiver": Special({"max_position_embeddings": T, "d_latents": D}),
    "GPT2DoubleHeadsModel": Special({}, double_heads),
    "OpenAIGPTDoubleHeadsModel": Special({}, double_heads),
    "AlbertForPreTraining": Special({}, pretraining),
    "BertForPreTraining": Special({}, pretraining),
    "BigBirdForPreTraining": Special({}, pretraining),
    "ErnieForPreTraining": Special({}, pretraining),
    "FNetForPreTraining": Special({}, pretraining),
    "MegatronBertForPreTraining": Special({}, pretraining),
    "MobileBertForPreTraining": Special(
        {"intra_bottleneck_size": D, "true_hidden_size": D}, pretraining
    ),
    "FlavaForPreTraining": Special({}, flava),
    "RoCBertForPreTraining": Special({}, roc_bert),
}
TABLE["ReformerForMaskedLM"] = TABLE["reformer"]


def special(family: Family) -> Special:
    """The entry of a class, or of a name, or an empty one."""
    return TABLE.get(family.model, TABLE.get(family.name, Special()))
