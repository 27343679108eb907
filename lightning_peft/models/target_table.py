"""Usual target layers by architecture: suffixes of transformers 5's module names.

A family is (LoRA's layers, IA3's layers, IA3's feed-forward layers). LoRA's are query and value, or
the fused projection, as Hugging Face peft's table has them where it has the type; IA3's are key,
value and the layer that leads out of the feed-forward block, as its paper says.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAMILIES", "MODEL_TYPES", "SHARED_INPUTS", "Family", "SharedInput"]


class Family(NamedTuple):
    """Suffixes of the layers that a method adapts by default.

    Attributes:
        lora: For LoRA and every method that changes attention weights.
        ia3: For IA3: key and value, then the feed-forward ones.
        feedforward: Those of `ia3` that are scaled on the input side.
    """

    lora: tuple[str, ...]
    ia3: tuple[str, ...]
    feedforward: tuple[str, ...]


class SharedInput(NamedTuple):
    """Children of one module that its forward calls with one tensor.

    Attributes:
        children: Names of the children, the one that is called first in front. A module may lack
            some of them.
        inside: Name of a module that must enclose them; "" for any place. In cross-attention the
            query reads another tensor than key and value.
    """

    children: tuple[str, ...]
    inside: str = ""


FAMILIES: dict[str, Family] = {
    # q_proj/k_proj/v_proj/o_proj, gate_proj/up_proj/down_proj
    "llama": Family(("q_proj", "v_proj"), ("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "moe": Family(("q_proj", "v_proj"), ("k_proj", "v_proj"), ()),
    "phi": Family(("q_proj", "v_proj", "fc1", "fc2"), ("k_proj", "v_proj", "fc2"), ("fc2",)),
    "phi3": Family(("qkv_proj",), ("qkv_proj", "down_proj"), ("down_proj",)),
    "starcoder2": Family(("q_proj", "v_proj"), ("k_proj", "v_proj", "c_proj"), ("c_proj",)),
    "opt": Family(("q_proj", "v_proj"), ("k_proj", "v_proj", "fc2"), ("fc2",)),
    "gptj": Family(("q_proj", "v_proj"), ("k_proj", "v_proj", "fc_out"), ("fc_out",)),
    "gpt_neo": Family(("q_proj", "v_proj"), ("k_proj", "v_proj", "mlp.c_proj"), ("mlp.c_proj",)),
    "codegen": Family(("qkv_proj",), ("qkv_proj", "fc_out"), ("fc_out",)),
    "gpt2": Family(("c_attn",), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_neox": Family(
        ("query_key_value",), ("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)
    ),
    "mpt": Family(("Wqkv",), ("Wqkv", "down_proj"), ("down_proj",)),
    "deepseek": Family(("q_a_proj", "q_b_proj", "q_proj", "kv_b_proj"), ("kv_b_proj",), ()),
    "deepseek_v4": Family(
        ("q_a_proj", "q_b_proj", "self_attn.kv_proj"), ("self_attn.kv_proj",), ()
    ),
    # Values in two halves; keys that are values too; keys and values in one, queries in experts
    "zaya": Family(
        ("q_proj", "v_proj_current", "v_proj_delayed"),
        ("k_proj", "v_proj_current", "v_proj_delayed"),
        (),
    ),
    "diffusion_gemma": Family(("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj"), ()),
    "jetmoe": Family(("kv_proj",), ("kv_proj",), ()),
    "nemotron_h": Family(
        ("q_proj", "k_proj", "v_proj", "o_proj"), ("k_proj", "v_proj", "down_proj"), ("down_proj",)
    ),
    # Models that bring their own code; peft's table lists them
    "chatglm": Family(
        ("query_key_value",), ("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)
    ),
    "refined_web": Family(
        ("query_key_value",), ("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)
    ),
    "btlm": Family(("c_proj", "c_attn"), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "rwkv7": Family(
        ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"), ("k_proj", "v_proj", "value"), ()
    ),
    "mamba": Family(("in_proj", "x_proj"), ("in_proj",), ()),
    "mamba2": Family(("in_proj",), ("in_proj",), ()),
    "bert": Family(("query", "value"), ("key", "value", "output.dense"), ("output.dense",)),
    "albert": Family(("query", "value"), ("key", "value", "ffn_output"), ("ffn_output",)),
    "modernbert": Family(("Wqkv",), ("Wqkv", "mlp.Wo"), ("mlp.Wo",)),
    "distilbert": Family(("q_lin", "v_lin"), ("k_lin", "v_lin", "lin2"), ("lin2",)),
    "deberta": Family(("in_proj",), ("in_proj", "output.dense"), ("output.dense",)),
    "deberta-v2": Family(
        ("query_proj", "value_proj"), ("key_proj", "value_proj", "output.dense"), ("output.dense",)
    ),
    "t5": Family(("q", "v"), ("k", "v", "wo"), ("wo",)),
    # Encoder-decoders and towers with q_proj … and fc1, fc2
    "bart": Family(("q_proj", "v_proj"), ("k_proj", "v_proj", "fc2"), ("fc2",)),
    "longformer": Family(
        ("query", "value", "query_global", "value_global"),
        ("key", "value", "output.dense"),
        ("output.dense",),
    ),
    "led": Family(
        ("query", "value", "q_proj", "v_proj"), ("key", "value", "k_proj", "fc2"), ("fc2",)
    ),
    "wav2vec2": Family(
        ("q_proj", "v_proj"), ("k_proj", "v_proj", "output_dense"), ("output_dense",)
    ),
    "mpnet": Family(("attn.q", "attn.v"), ("attn.k", "attn.v", "output.dense"), ("output.dense",)),
    "modernbert-decoder": Family(("q_proj", "v_proj"), ("k_proj", "v_proj", "mlp.Wo"), ("mlp.Wo",)),
    "xlnet": Family(("layer_1", "layer_2"), ("layer_2",), ("layer_2",)),
    "funnel": Family(("q_head", "v_head"), ("k_head", "v_head", "linear_2"), ("linear_2",)),
    "prophetnet": Family(
        ("query_proj", "value_proj"), ("key_proj", "value_proj", "output"), ("output",)
    ),
    "ctrl": Family(("Wq", "Wv"), ("Wk", "Wv"), ()),
    "rwkv": Family(("key", "value", "receptance"), ("key", "value"), ()),
    "xlstm": Family(("q", "v"), ("k", "v", "proj_down"), ("proj_down",)),
    "cpmant": Family(("project_q", "project_v"), ("project_k", "project_v", "w_out"), ("w_out",)),
    "granitemoehybrid": Family(
        ("q_proj", "v_proj", "in_proj"), ("k_proj", "v_proj", "in_proj"), ()
    ),
    "lfm2": Family(("q_proj", "v_proj", "in_proj"), ("k_proj", "v_proj", "w2"), ("w2",)),
    "mobilevit": Family(("query", "value"), ("key", "value", "output.dense"), ("output.dense",)),
    "pvt_v2": Family(("query", "value"), ("key", "value", "dense2"), ("dense2",)),
    "cvt": Family(
        ("projection_query", "projection_value"),
        ("projection_key", "projection_value", "output.dense"),
        ("output.dense",),
    ),
    "qwen_vision": Family(
        ("qkv",), ("qkv", "fc2", "linear_fc2", "down_proj"), ("fc2", "linear_fc2", "down_proj")
    ),
    "hiera": Family(("qkv",), ("qkv", "fc2"), ("fc2",)),
    "focalnet": Family(("projection_in", "fc1", "fc2"), ("projection_in", "fc2"), ("fc2",)),
    "convnext": Family(("pwconv1", "pwconv2"), ("pwconv1", "pwconv2"), ("pwconv2",)),
    "resnet": Family(("convolution",), ("convolution",), ()),
    "bit": Family(("conv1", "conv2", "conv3"), ("conv3",), ()),
    "poolformer": Family(("conv1", "conv2"), ("conv1", "conv2"), ("conv2",)),
    "blip": Family(("query", "value", "qkv"), ("key", "value", "output.dense"), ("output.dense",)),
    "blip-2": Family(("q_proj", "v_proj", "q", "v"), ("k_proj", "v_proj", "fc2"), ("fc2",)),
}

_BY_FAMILY: dict[str, str] = {
    "llama": "llama mistral mistral3 ministral qwen2 qwen3 stablelm olmo olmo2 olmo3 granite "
    "cohere cohere2 smollm3 gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text helium nemotron "
    "seed_oss arcee glm glm4 exaone4 mllama mllama_text_model llava llava_next idefics2 idefics3 "
    "paligemma qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3_vl qwen3_vl_text smolvlm "
    "internvl pixtral ovis2_vision jamba llama4 llama4_text ernie4_5 hunyuan_v1_dense "
    "recurrent_gemma apertus beam "
    "bitnet cwm diffllama doge emu3_text_model falcon_h1 flint gemma4_unified gemma4_unified_text "
    "got_ocr2 granite_swa hrm_text hyperclovax jais2 ministral3 moss_transcribe_diarize "
    "olmo_hybrid qwen3_5 qwen3_5_text vaultgemma audioflamingo3 glmasr musicflamingo qwen2_audio "
    "qwen3_asr t5gemma t5gemma2 voxtral eurobert gte nomic_bert ultrabert ultravbert",
    "moe": "mixtral qwen2_moe qwen3_moe qwen3_next olmoe granitemoe granitemoeshared gpt_oss dbrx "
    "phimoe minimax glm4_moe ernie4_5_moe hunyuan_v1_moe dots1 flex_olmo afmoe aria_text "
    "cohere2_moe exaone_moe granitemoe_swa hy_v3 inkling2_text inkling_text kolibri1 laguna mellum "
    "mimo_v2_flash minimax_m2 minimax_m3_vl_text qwen3_5_moe qwen3_5_moe_text solar_open "
    "nemo_speechlm lfm2_moe "
    "aria deepseek_ocr2 deepseek_ocr2_text ernie4_5_vl_moe ernie4_5_vl_moe_text "
    "glm4v_moe glm4v_moe_text inkling2 inkling_mm_model "
    "minimax_m3_vl muse_spark muse_spark_text openai_privacy_filter qwen3_omni_moe "
    "qwen3_omni_moe_talker_text qwen3_omni_moe_text qwen3_omni_moe_thinker "
    "qwen3_vl_moe qwen3_vl_moe_text qwen4_exp qwen4_exp_text unlimited_ocr "
    "unlimited_ocr_text step3p5 step3p7",
    "phi": "phi",
    "phi3": "phi3 phi4_multimodal",
    "starcoder2": "starcoder2",
    "opt": "opt xglm biogpt",
    "gptj": "gptj",
    "gpt_neo": "gpt_neo",
    "codegen": "codegen",
    "gpt2": "gpt2 gpt_bigcode openai-gpt imagegpt",
    "gpt_neox": "gpt_neox gpt_neox_japanese bloom falcon persimmon fuyu",
    "mpt": "mpt",
    "deepseek": "deepseek_v2 deepseek_v3 minicpm3 glm4_moe_lite mistral4 hy_v4 "
    "axk1 axk2 bailing_hybrid deepseek_v32 dots3_note dots3_note_text "
    "glm5_next glm5_next_text glm_moe_dsa kimi_linear longcat_flash mistral_large4 "
    "mistral_large4_text",
    "deepseek_v4": "deepseek_v4",
    "granitemoehybrid": "granitemoehybrid",
    "nemotron_h": "nemotron_h",
    "zaya": "zaya",
    "jetmoe": "jetmoe",
    "diffusion_gemma": "diffusion_gemma diffusion_gemma_text",
    "mamba": "mamba falcon_mamba",
    "mamba2": "mamba2",
    "bert": "bert roberta xlm-roberta xlm-roberta-xl electra camembert layoutlm layoutlmv3 esm "
    "ernie roformer megatron-bert data2vec-text convbert nystromformer splinter bert-generation "
    "big_bird rembert roberta-prelayernorm roc_bert canine mobilebert mra squeezebert tapas yoso "
    "markuplm pvt data2vec-vision swinv2 donut-swin",
    "albert": "albert",
    "mpnet": "mpnet",
    "modernbert": "modernbert",
    "modernbert-decoder": "modernbert-decoder",
    "xlnet": "xlnet",
    "funnel": "funnel",
    "prophetnet": "prophetnet",
    "ctrl": "ctrl",
    "rwkv": "rwkv",
    "chatglm": "chatglm",
    "refined_web": "RefinedWeb RefinedWebModel",
    "btlm": "btlm",
    "rwkv7": "rwkv7",
    "xlstm": "xlstm",
    "cpmant": "cpmant",
    "lfm2": "lfm2 lfm3",
    "mobilevit": "mobilevit",
    "pvt_v2": "pvt_v2",
    "cvt": "cvt",
    "qwen_vision": "qwen2_vl_vision qwen2_5_vl_vision qwen3_vl_vision qwen3_vl_moe_vision "
    "glm4v_vision blip_2_vision_model instructblip_vision_model",
    "hiera": "hiera",
    "focalnet": "focalnet",
    "bit": "bit",
    "poolformer": "poolformer",
    "distilbert": "distilbert",
    "deberta": "deberta",
    "deberta-v2": "deberta-v2 sew-d",
    "t5": "t5 mt5 umt5 longt5 switch_transformers pix2struct",
    "bart": "bart mbart marian pegasus pegasus_x m2m_100 blenderbot blenderbot-small plbart "
    "bigbird_pegasus whisper speech_to_text clip clip_text_model clip_vision_model "
    "siglip siglip_text_model siglip_vision_model siglip2 idefics2_vision idefics3_vision "
    "smolvlm_vision internvl_vision mllama_vision_model llama4_vision_model git_vision_model "
    "janus_vision_model idefics_vision kosmos_2_vision_model vit deit dinov2 "
    "dinov2_with_registers dinov3_vit swin "
    "vit_mae vit_msn detr chinese_clip altclip beit segformer mvp "
    "nanochat trocr fsmt nllb-moe seamless_m4t seamless_m4t_v2 ijepa metaclip_2 jina_embeddings_v3 "
    "modernvbert",
    "longformer": "longformer",
    "led": "led git",
    "wav2vec2": "wav2vec2 hubert wavlm unispeech unispeech-sat data2vec-audio sew",
    "convnext": "convnext convnextv2",
    "resnet": "resnet regnet mobilenet_v1 mobilenet_v2 hgnet_v2",
    "blip": "blip",
    "blip-2": "blip-2 instructblip",
}

#: model_type of a transformers config → family.
MODEL_TYPES: dict[str, Family] = {
    model_type: FAMILIES[family]
    for family, types in _BY_FAMILY.items()
    for model_type in types.split()
}


def _shared(*lines: str) -> tuple[SharedInput, ...]:
    """Read lines such as ``"k_proj v_proj in cross_attn"``."""
    return tuple(
        SharedInput(tuple(children.split()), inside)
        for children, _, inside in (line.partition(" in ") for line in lines)
    )


_GATED = "gate_proj up_proj"
_QKV = "q_proj k_proj v_proj gate_proj g_proj r_proj"
_CROSS = "k_proj v_proj in cross_attn"
_ENCODER = "k_proj v_proj in encoder_attn"
_DELTA = "in_proj_qkv in_proj_z in_proj_b in_proj_a"

# Family → children that read one tensor; a child belongs to the first line that has it. Types that
# differ from their family follow.
_SHARED_BY_FAMILY: dict[str, tuple[SharedInput, ...]] = {
    "llama": _shared(_CROSS, _QKV, _GATED, _DELTA, "linear_y linear_x"),
    "moe": _shared(
        _CROSS, _QKV, _GATED, _DELTA, "in_proj_qkvz in_proj_ba", "w1 w3", "qkv_proj output_gate"
    ),
    "opt": _shared(_ENCODER, _QKV),
    "deepseek": _shared("q_a_proj kv_a_proj_with_mqa g_proj", _QKV, _GATED),
    "deepseek_v4": _shared("q_a_proj kv_proj", "kv_proj gate_proj", _GATED),
    "zaya": _shared("q_proj k_proj v_proj_current"),
    "diffusion_gemma": _shared("q_proj k_proj", _GATED),
    "bert": _shared("key value in crossattention", "query key value conv_out_layer"),
    "mpnet": _shared("q k v"),
    "distilbert": _shared("q_lin k_lin v_lin"),
    "deberta-v2": _shared("key_proj value_proj"),
    "t5": _shared(
        "k v in EncDecAttention",
        "q k v",
        "key value in encoder_decoder_attention",
        "query key value",
        "wi_0 wi_1",
    ),
    "bart": _shared(
        _ENCODER,
        "k_proj v_proj in cross_attention",
        _QKV,
        "query key value",
        "linear_q linear_k",
        _GATED,
    ),
    "led": _shared(_ENCODER, _QKV, "query key value"),
    "prophetnet": _shared("key_proj value_proj in cross_attn", "query_proj key_proj value_proj"),
    "xlstm": _shared("q k v ogate_preact igate_preact fgate_preact", "proj_up_gate proj_up"),
    "cpmant": _shared("project_k project_v", "w_0 w_1"),
    "lfm2": _shared(_QKV, "w1 w3"),
    "pvt_v2": _shared("key value"),
    "blip": _shared("key value in crossattention", "query key value"),
    "blip-2": _shared("key value in crossattention", "query key value"),
    "phi": _shared(_QKV),
    "phi3": _shared(_QKV),
    "starcoder2": _shared(_QKV),
    "gptj": _shared(_QKV),
    "gpt_neo": _shared(_QKV),
    "granitemoehybrid": _shared(_QKV),
    "nemotron_h": _shared(_QKV),
    "modernbert-decoder": _shared(_QKV),
    "wav2vec2": _shared(_QKV),
    "albert": _shared("query key value"),
    "longformer": _shared("query key value"),
    "mobilevit": _shared("query key value"),
}

#: model_type of a transformers config → children that read one tensor.
SHARED_INPUTS: dict[str, tuple[SharedInput, ...]] = {
    **{
        model_type: _SHARED_BY_FAMILY.get(family, ())
        for family, types in _BY_FAMILY.items()
        for model_type in types.split()
    },
    "falcon_h1": _shared(_QKV, "up_proj gate_proj"),  # its forward calls up_proj first
    "idefics2_perceiver": _shared("k_proj v_proj", _GATED),
    "canine": _shared("key value"),  # local attention: queries read other characters
    "pvt": _shared("key value"),
    "detr": _shared("q_proj k_proj in self_attn"),  # positions are added for queries and keys
}
