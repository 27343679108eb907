"""Names of the parts of a transformer block, by architecture (transformers 5).

Bottleneck adapters act on a block's two branches and on the stream between them, which no single
suffix names.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BLOCKS", "Block"]


class Block(NamedTuple):
    """Names inside one block.

    Attributes:
        attention: Modules whose output is the attention branch, before the residual.
        feedforward: Modules whose output is the feed-forward branch, before the residual.
        stream: The module whose input is the stream that enters the feed-forward branch; looked for
            upwards from the feed-forward module. Several names: the first that is there.
        norm: The normalisation behind the feed-forward residual (post-norm models), looked for in
            the same way; "" where the block's output is the residual sum itself (pre-norm).
    """

    attention: tuple[str, ...]
    feedforward: tuple[str, ...]
    stream: str
    norm: str = ""


_LLAMA = Block(("self_attn.o_proj",), ("mlp",), "post_attention_layernorm")
_BART = (("self_attn.out_proj", "encoder_attn.out_proj"), ("fc2",))
_NEOX = Block(("attention.dense",), ("mlp.dense_4h_to_h",), "post_attention_layernorm")

_GROUPS: list[tuple[Block, str]] = [
    (
        _LLAMA,
        "llama mistral ministral qwen2 qwen3 qwen2_moe qwen3_moe stablelm granite smollm3 gemma "
        "phi3 mixtral olmoe deepseek_v2 deepseek_v3 gpt_oss seed_oss arcee exaone4 olmo "
        "hunyuan_v1_dense hunyuan_v1_moe minimax dots1 glm4_moe ernie4_5 ernie4_5_moe",
    ),
    (
        _LLAMA._replace(stream="pre_feedforward_layernorm"),
        "gemma2 gemma3 gemma3_text gemma4 gemma4_text",
    ),
    (_LLAMA._replace(stream="mlp"), "olmo2 olmo3"),
    (_LLAMA._replace(feedforward=("block_sparse_moe",)), "granitemoe"),
    (_LLAMA._replace(feedforward=("feed_forward",)), "llama4 llama4_text"),
    (_LLAMA._replace(stream="input_layernorm"), "cohere cohere2"),
    (Block(("self_attn.dense",), ("mlp.fc2",), "input_layernorm"), "phi"),
    (Block(("self_attn.o_proj",), ("mlp.c_proj",), "post_attention_layernorm"), "starcoder2"),
    (Block(("self_attn.out_proj",), ("fc2",), "final_layer_norm"), "opt xglm biogpt"),
    (Block(("attn.c_proj",), ("mlp.c_proj",), "ln_2"), "gpt2 gpt_bigcode"),
    (Block(("attn.out_proj",), ("mlp.fc_out",), "ln_1"), "gptj codegen"),
    (Block(("attention.out_proj",), ("mlp.c_proj",), "ln_2"), "gpt_neo"),
    (_NEOX, "gpt_neox"),
    (_NEOX._replace(attention=("self_attention.dense",)), "bloom"),
    (
        _NEOX._replace(
            attention=("self_attention.dense",),
            stream="post_attention_layernorm ln_mlp input_layernorm",
        ),
        "falcon",
    ),
    (Block(("attn.out_proj",), ("ffn.down_proj",), "norm_2"), "mpt"),
    (
        Block(("attention.output.dense",), ("output.dense",), "intermediate", "LayerNorm"),
        "bert roberta xlm-roberta xlm-roberta-xl electra camembert layoutlm ernie deberta "
        "deberta-v2",
    ),
    (Block(("attention.dense",), ("ffn_output",), "ffn", "full_layer_layer_norm"), "albert"),
    (Block(("attention.out_lin",), ("ffn.lin2",), "ffn", "output_layer_norm"), "distilbert"),
    (Block(("attn.Wo",), ("mlp.Wo",), "mlp_norm"), "modernbert modernbert-decoder"),
    (
        Block(("SelfAttention.o", "EncDecAttention.o"), ("DenseReluDense.wo",), "layer_norm"),
        "t5 mt5 umt5 longt5",
    ),
    (Block(*_BART, "fc1", "final_layer_norm"), "bart marian plbart blenderbot-small"),
    (
        Block(*_BART, "final_layer_norm"),
        "mbart pegasus m2m_100 whisper speech_to_text blenderbot",
    ),
    (
        Block(("self_attn.out_proj",), ("mlp.fc2",), "layer_norm2"),
        "clip clip_text_model clip_vision_model siglip siglip_text_model siglip_vision_model",
    ),
    (Block(("attention.o_proj",), ("mlp.fc2",), "layernorm_after"), "vit deit"),
]

#: model_type of a transformers config → names inside its blocks.
BLOCKS: dict[str, Block] = {
    model_type: block for block, types in _GROUPS for model_type in types.split()
}
