"""The usual choice of layers by architecture, as data: suffixes in transformers 5's module names.

A family is (LoRA's layers, IA3's layers, IA3's feed-forward layers). LoRA's are query and value, or
the fused projection, as Hugging Face peft's table has them where it has the type; IA3's are key,
value and the layer that leads out of the feed-forward block, as its paper says.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAMILIES", "MODEL_TYPES", "Family"]


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
    "nemotron_h": Family(
        ("q_proj", "k_proj", "v_proj", "o_proj"), ("k_proj", "v_proj", "down_proj"), ("down_proj",)
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
    "segformer": Family(("query", "value"), ("key", "value", "dense2"), ("dense2",)),
    "convnext": Family(("pwconv1", "pwconv2"), ("pwconv1", "pwconv2"), ("pwconv2",)),
    "resnet": Family(("convolution",), ("convolution",), ()),
    "blip": Family(("query", "value", "qkv"), ("key", "value", "output.dense"), ("output.dense",)),
    "blip-2": Family(("q_proj", "v_proj", "q", "v"), ("k_proj", "v_proj", "fc2"), ("fc2",)),
}

_BY_FAMILY: dict[str, str] = {
    "llama": "llama mistral mistral3 ministral qwen2 qwen3 stablelm olmo olmo2 olmo3 granite "
    "cohere cohere2 smollm3 gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text helium nemotron "
    "seed_oss arcee glm glm4 exaone4 mllama mllama_text_model llava llava_next idefics2 idefics3 "
    "paligemma qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text qwen3_vl qwen3_vl_text smolvlm "
    "internvl jamba llama4 llama4_text ernie4_5 hunyuan_v1_dense persimmon recurrent_gemma",
    "moe": "mixtral qwen2_moe qwen3_moe qwen3_next olmoe granitemoe granitemoeshared gpt_oss dbrx "
    "phimoe minimax glm4_moe ernie4_5_moe hunyuan_v1_moe dots1 flex_olmo jetmoe",
    "phi": "phi",
    "phi3": "phi3 phi4_multimodal",
    "starcoder2": "starcoder2",
    "opt": "opt xglm biogpt",
    "gptj": "gptj",
    "gpt_neo": "gpt_neo",
    "codegen": "codegen",
    "gpt2": "gpt2 gpt_bigcode openai-gpt",
    "gpt_neox": "gpt_neox gpt_neox_japanese bloom falcon",
    "mpt": "mpt",
    "deepseek": "deepseek_v2 deepseek_v3 minicpm3",
    "nemotron_h": "nemotron_h",
    "mamba": "mamba falcon_mamba",
    "mamba2": "mamba2",
    "bert": "bert roberta xlm-roberta xlm-roberta-xl electra camembert layoutlm layoutlmv3 esm "
    "ernie mpnet roformer megatron-bert data2vec-text data2vec-audio beit data2vec-vision "
    "convbert nystromformer splinter bert-generation",
    "albert": "albert",
    "modernbert": "modernbert modernbert-decoder",
    "distilbert": "distilbert",
    "deberta": "deberta",
    "deberta-v2": "deberta-v2 sew-d",
    "t5": "t5 mt5 umt5 longt5 switch_transformers pix2struct",
    "bart": "bart mbart marian pegasus pegasus_x m2m_100 blenderbot blenderbot-small plbart "
    "bigbird_pegasus whisper speech_to_text clip clip_text_model clip_vision_model "
    "siglip siglip_text_model siglip_vision_model siglip2 vit deit dinov2 "
    "dinov2_with_registers dinov3_vit swin swinv2 "
    "donut-swin vit_mae vit_msn detr chinese_clip altclip",
    "longformer": "longformer",
    "led": "led",
    "wav2vec2": "wav2vec2 hubert wavlm unispeech unispeech-sat data2vec-audio sew",
    "segformer": "segformer",
    "convnext": "convnext convnextv2",
    "resnet": "resnet regnet",
    "blip": "blip",
    "blip-2": "blip-2 instructblip",
}

#: model_type of a transformers config → family.
MODEL_TYPES: dict[str, Family] = {
    model_type: FAMILIES[family]
    for family, types in _BY_FAMILY.items()
    for model_type in types.split()
}
