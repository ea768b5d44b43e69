"""Networks of Hugging Face's transformers, built from tiny configurations.

All sizes differ, so that none matches another by chance: hidden 48 in 6 heads of 8 (3 of them for keys and values), 80
in the perceptron, 2 layers, 61 tokens, 33 positions, sequences of 7.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entry import BATCH, Entry, Inputs, drawn, seeded, tokens

VOCABULARY, LENGTH = 61, 7
WIDTH = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
TEXT = WIDTH | {"vocab_size": VOCABULARY, "max_position_embeddings": 33}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | SPECIAL | {"num_key_value_heads": 3}
EVEN = TEXT | SPECIAL | {"num_key_value_heads": 6}  # for networks published with equal numbers of both heads
IMAGE = WIDTH | {"image_size": 32, "patch_size": 8, "num_labels": 7}
SEQ2SEQ = SPECIAL | {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 33,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 4], "window_size": 4}
SPEECH = WIDTH | {
    "vocab_size": 31,
    "conv_dim": (20, 28),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 3,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
}


def _quiet(config: Any) -> Any:
    """Switch off dropout and the cache of keys and values, and use initial weights that are large enough to matter."""
    for name, value in config.to_dict().items():
        part = getattr(config, name)
        if isinstance(value, dict) and hasattr(part, "to_dict"):
            _quiet(part)
        elif ("drop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif name == "use_cache":
            setattr(config, name, False)
        elif name in ("initializer_range", "init_std"):
            setattr(config, name, 0.2)
    return config


def _entry(
    name: str,
    family: str,
    inputs: Callable[[], Inputs],
    sizes: Mapping[str, Any],
    on_meta: bool = True,
    **more: Any,
) -> Entry:
    def build() -> nn.Module:
        kind = getattr(importlib.import_module("transformers"), name)
        network: nn.Module = kind(_quiet(kind.config_class(**{**sizes, **more})))
        return network

    return Entry(seeded(build), inputs, "transformers", family, on_meta)


def _text() -> Inputs:
    return (), {"input_ids": tokens(VOCABULARY, LENGTH)}


def _text_and_mask() -> Inputs:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -2:] = 0
    return (), {"input_ids": tokens(VOCABULARY, LENGTH), "attention_mask": mask}


def _source_and_target() -> Inputs:
    return (), {"input_ids": tokens(VOCABULARY, LENGTH), "decoder_input_ids": tokens(VOCABULARY, 5)}


def _pixels(size: int) -> Callable[[], Inputs]:
    return drawn(lambda: ((), {"pixel_values": torch.randn(BATCH, 3, size, size)}))


def _decoder(name: str, sizes: Mapping[str, Any] = GROUPED, **more: Any) -> Entry:
    return _entry(name, "decoder", drawn(_text), sizes, **more)


def _mixture(name: str, sizes: Mapping[str, Any] = EVEN, experts: str = "batched_mm", **more: Any) -> Entry:
    """A mixture of experts that computes its experts in a way that also runs in double precision."""
    return _entry(name, "mixture of experts", drawn(_text), sizes, experts_implementation=experts, **more)


def _recurrent(name: str, sizes: Mapping[str, Any], **more: Any) -> Entry:
    return _entry(name, "state space or recurrent", drawn(_text), sizes, **more)


def _encoder(name: str, sizes: Mapping[str, Any] = TEXT, **more: Any) -> Entry:
    return _entry(name, "encoder", drawn(_text_and_mask), sizes, **{"pad_token_id": 0, "num_labels": 7, **more})


def _seq2seq(name: str, sizes: Mapping[str, Any], **more: Any) -> Entry:
    return _entry(name, "encoder-decoder", drawn(_source_and_target), sizes, **more)


def _vision(name: str, sizes: Mapping[str, Any] = IMAGE, size: int = 32, **more: Any) -> Entry:
    return _entry(name, "vision", _pixels(size), sizes, **more)


def _wave(name: str) -> Entry:
    return _entry(name, "speech", drawn(lambda: ((), {"input_values": torch.randn(BATCH, 400)})), SPEECH)


DECODERS = {
    "gpt2": _decoder(
        "GPT2LMHeadModel", SPECIAL, vocab_size=VOCABULARY, n_positions=33, n_embd=48, n_layer=2, n_head=6, n_inner=80
    ),
    "gpt_neo": _decoder(
        "GPTNeoForCausalLM",
        SPECIAL,
        vocab_size=VOCABULARY,
        max_position_embeddings=33,
        hidden_size=48,
        num_layers=2,
        num_heads=6,
        intermediate_size=80,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "gpt_neox": _decoder("GPTNeoXForCausalLM", TEXT | SPECIAL, rotary_pct=0.5),
    "gptj": _decoder(
        "GPTJForCausalLM",
        SPECIAL,
        vocab_size=VOCABULARY,
        n_positions=33,
        n_embd=48,
        n_layer=2,
        n_head=6,
        n_inner=80,
        rotary_dim=4,
    ),
    "gpt_bigcode": _decoder(
        "GPTBigCodeForCausalLM",
        SPECIAL,
        vocab_size=VOCABULARY,
        n_positions=33,
        n_embd=48,
        n_layer=2,
        n_head=6,
        n_inner=80,
    ),
    "codegen": _decoder(
        "CodeGenForCausalLM",
        SPECIAL,
        vocab_size=VOCABULARY,
        n_positions=33,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_inner=80,
        rotary_dim=4,
    ),
    "opt": _decoder("OPTForCausalLM", TEXT | SPECIAL, ffn_dim=80, word_embed_proj_dim=48),
    "bloom": _decoder("BloomForCausalLM", SPECIAL, vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6),
    "mpt": _decoder(
        "MptForCausalLM", vocab_size=VOCABULARY, d_model=48, n_layers=2, n_heads=6, expansion_ratio=3, max_seq_len=33
    ),
    "falcon": _decoder("FalconForCausalLM", TEXT | SPECIAL, multi_query=True, ffn_hidden_size=80),
    "llama": _decoder("LlamaForCausalLM"),
    "llama_mha": _decoder("LlamaForCausalLM", EVEN),
    "llama_tied": _decoder("LlamaForCausalLM", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": _decoder("MistralForCausalLM", sliding_window=4),
    "qwen2": _decoder("Qwen2ForCausalLM"),
    "qwen3": _decoder("Qwen3ForCausalLM", head_dim=10),
    "gemma": _decoder("GemmaForCausalLM", head_dim=10, num_key_value_heads=1),
    "gemma2": _decoder("Gemma2ForCausalLM", head_dim=10, query_pre_attn_scalar=10, sliding_window=4),
    "gemma3": _decoder("Gemma3ForCausalLM", head_dim=10, query_pre_attn_scalar=10, sliding_window=4),
    "phi": _decoder("PhiForCausalLM", EVEN, partial_rotary_factor=0.5),
    "phi3": _decoder("Phi3ForCausalLM"),
    "stablelm": _decoder("StableLmForCausalLM", EVEN, partial_rotary_factor=0.5),
    "olmo": _decoder("OlmoForCausalLM", EVEN),
    "olmo2": _decoder("Olmo2ForCausalLM", EVEN),
    "cohere": _decoder("CohereForCausalLM"),
    "granite": _decoder("GraniteForCausalLM"),
    "starcoder2": _decoder("Starcoder2ForCausalLM"),
    "smollm3": _decoder("SmolLM3ForCausalLM"),
    "glm4": _decoder("Glm4ForCausalLM", head_dim=8),
    "nemotron": _decoder("NemotronForCausalLM"),
    "mixtral": _mixture("MixtralForCausalLM", GROUPED, num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": _mixture(
        "Qwen2MoeForCausalLM",
        experts="eager",
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=28,
        shared_expert_intermediate_size=36,
    ),
    "olmoe": _mixture("OlmoeForCausalLM", num_experts=5, num_experts_per_tok=2),
    "deepseek_v2": _mixture(
        "DeepseekV2ForCausalLM",
        q_lora_rank=20,
        kv_lora_rank=12,
        qk_nope_head_dim=10,
        qk_rope_head_dim=4,
        v_head_dim=14,
        n_routed_experts=5,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=28,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "mamba": _recurrent(
        "MambaForCausalLM",
        SPECIAL,
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        state_size=6,
        time_step_rank=5,
    ),
    "mamba2": _recurrent(
        "Mamba2ForCausalLM",
        SPECIAL,
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        state_size=6,
        num_heads=8,
        head_dim=12,
        n_groups=2,
        chunk_size=4,
    ),
    "rwkv": _recurrent(
        "RwkvForCausalLM",
        SPECIAL,
        vocab_size=VOCABULARY,
        hidden_size=48,
        attention_hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=2,
        context_length=33,
    ),
    "recurrent_gemma": _recurrent(
        "RecurrentGemmaForCausalLM",
        TEXT | SPECIAL,
        num_hidden_layers=3,
        num_key_value_heads=1,
        lru_width=36,
        attention_window_size=4,
        w_init_variance_scale=0.2,
    ),
}

ENCODERS = {
    "bert": _encoder("BertForSequenceClassification"),
    "roberta": _encoder("RobertaForSequenceClassification"),
    "distilbert": _encoder(
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "max_position_embeddings": 33, "dim": 48, "hidden_dim": 80},
        n_layers=2,
        n_heads=6,
    ),
    "albert": _encoder("AlbertForSequenceClassification", embedding_size=20),
    "electra": _encoder("ElectraForSequenceClassification", embedding_size=20),
    "deberta_v2": _encoder(
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=6,
        share_att_key=True,
    ),
    "mpnet": _encoder("MPNetForSequenceClassification"),
    "convbert": _encoder("ConvBertForSequenceClassification", embedding_size=20, head_ratio=2, conv_kernel_size=3),
    "squeezebert": _encoder(
        "SqueezeBertForSequenceClassification",
        embedding_size=48,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        intermediate_groups=2,
        output_groups=2,
    ),
    "modernbert": _encoder(
        "ModernBertForSequenceClassification",
        TEXT | SPECIAL,
        cls_token_id=3,
        sep_token_id=4,
        local_attention=4,
        global_attn_every_n_layers=2,
    ),
    "fnet": _entry("FNetForSequenceClassification", "encoder", drawn(_text), TEXT, pad_token_id=0, num_labels=7),
    "xlnet": _encoder(
        "XLNetForSequenceClassification",
        {"vocab_size": VOCABULARY, "d_model": 48, "n_layer": 2, "n_head": 6, "d_inner": 80},
        on_meta=False,  # makes its weights on the CPU regardless of the default device
    ),
    "esm": _encoder("EsmForSequenceClassification", position_embedding_type="rotary", mask_token_id=4),
    "t5": _seq2seq("T5ForConditionalGeneration", T5),
    "t5_gated": _seq2seq("T5ForConditionalGeneration", T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": _seq2seq("BartForConditionalGeneration", SEQ2SEQ),
    "marian": _seq2seq("MarianMTModel", SEQ2SEQ),
    "pegasus": _seq2seq("PegasusForConditionalGeneration", SEQ2SEQ),
}

IMAGES_AND_SOUND = {
    "hf_vit": _vision("ViTForImageClassification"),
    "hf_deit": _vision("DeiTForImageClassification"),
    "hf_beit": _vision("BeitForImageClassification", use_relative_position_bias=True),
    "dinov2": _vision("Dinov2ForImageClassification", mlp_ratio=3),
    "hf_swin": _vision("SwinForImageClassification", SWIN, num_labels=7),
    "hf_swinv2": _vision("Swinv2ForImageClassification", SWIN, num_labels=7),
    "hf_convnext": _vision(
        "ConvNextForImageClassification",
        {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 1, 2, 1], "num_labels": 7},
        size=64,
    ),
    "hf_resnet": _vision(
        "ResNetForImageClassification",
        {"embedding_size": 12, "hidden_sizes": [32, 40, 48], "depths": [2, 1, 2], "num_labels": 7},
    ),
    "segformer": _vision(
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [12, 20, 32, 40], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 4, 5]},
        size=64,
        sr_ratios=[4, 2, 2, 1],
        mlp_ratios=[2, 3, 2, 2],
        decoder_hidden_size=28,
        num_labels=7,
    ),
    "mobilevit": _vision(
        "MobileViTForImageClassification",
        {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 20, 28, 36, 44], "num_attention_heads": 4},
        size=64,
        num_labels=7,
    ),
    "hf_levit": _vision(
        "LevitForImageClassification",
        {"hidden_sizes": [32, 40, 48], "num_attention_heads": [2, 3, 4], "depths": [1, 2, 1]},
        size=64,
        image_size=64,
        key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
        num_labels=7,
    ),
    "clip_vision": _vision("CLIPVisionModelWithProjection", projection_dim=20),
    "siglip_vision": _vision("SiglipVisionModel"),
    "clip_text": _entry("CLIPTextModelWithProjection", "text tower", drawn(_text), TEXT | SPECIAL, projection_dim=20),
    "whisper": _entry(
        "WhisperForConditionalGeneration",
        "speech",
        drawn(
            lambda: (
                (),
                {"input_features": torch.randn(BATCH, 10, 24), "decoder_input_ids": tokens(VOCABULARY, 5)},
            )
        ),
        SEQ2SEQ,
        num_mel_bins=10,
        max_source_positions=12,
        max_target_positions=33,
    ),
    "wav2vec2": _wave("Wav2Vec2ForCTC"),
    "hubert": _wave("HubertForCTC"),
}

ENTRIES = DECODERS | ENCODERS | IMAGES_AND_SOUND
