"""Tiny vision-language models built from a config, and a batch with one image per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr
from torch import Tensor, nn

__all__ = ["MODELS", "built", "inputs"]

IMAGE, TOKENS, LENGTH = 110, 4, 9
_TEXT: dict[str, Any] = {
    **{"vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "image_size": 16, "patch_size": 8},
}
_MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
_QWEN: dict[str, Any] = {
    **{"image_token_id": IMAGE, "video_token_id": 111},
    **{"vision_start_token_id": 112, "vision_end_token_id": 113},
}
_PATCHES: dict[str, Any] = {
    **{"depth": 2, "num_heads": 4, "patch_size": 8},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2},
}


def _llava() -> nn.Module:
    return tr.LlavaForConditionalGeneration(
        tr.LlavaConfig(
            text_config=tr.LlamaConfig(**_TEXT),
            vision_config=tr.CLIPVisionConfig(**_VISION),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            image_seq_length=TOKENS,
        )
    )


def _gemma3() -> nn.Module:
    model: Any = tr.Gemma3ForConditionalGeneration(
        tr.Gemma3Config(
            text_config=tr.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=16),
            vision_config=tr.SiglipVisionConfig(**_VISION),
            mm_tokens_per_image=TOKENS,
            image_token_id=IMAGE,
        )
    )
    # It starts at zero, and no gradient would reach the vision part.
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model  # type: ignore[no-any-return]


def _idefics2() -> nn.Module:
    resampler = {
        **{"hidden_size": 32, "resampler_n_latents": TOKENS, "resampler_depth": 1},
        **{"resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2},
    }
    return tr.Idefics2ForConditionalGeneration(
        tr.Idefics2Config(
            text_config=tr.MistralConfig(**_TEXT),
            vision_config=_VISION,
            perceiver_config=resampler,
            image_token_id=IMAGE,
        )
    )


def _idefics3() -> nn.Module:
    return tr.Idefics3ForConditionalGeneration(
        tr.Idefics3Config(
            text_config=tr.LlamaConfig(**_TEXT),
            vision_config=_VISION,
            scale_factor=1,
            image_token_id=IMAGE,
        )
    )


def _qwen2_vl() -> nn.Module:
    vision = {**_PATCHES, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return tr.Qwen2VLForConditionalGeneration(
        tr.Qwen2VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN)
    )


def _qwen2_5_vl() -> nn.Module:
    vision = {
        **{**_PATCHES, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64},
        **{"window_size": 32, "fullatt_block_indexes": [1]},
    }
    return tr.Qwen2_5_VLForConditionalGeneration(
        tr.Qwen2_5_VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN)
    )


def _qwen3_vl() -> nn.Module:
    vision = {
        **{**_PATCHES, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64},
        **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    text = {**_TEXT, **_MROPE, "head_dim": 8}
    return tr.Qwen3VLForConditionalGeneration(
        tr.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN)
    )


def _mistral3() -> nn.Module:
    return tr.Mistral3ForConditionalGeneration(
        tr.Mistral3Config(
            text_config=tr.MistralConfig(**_TEXT),
            vision_config=tr.PixtralVisionConfig(**_VISION),
            image_token_id=IMAGE,
            spatial_merge_size=1,
            vision_feature_layer=-1,
        )
    )


def _internvl() -> nn.Module:
    sides = {"image_size": [16, 16], "patch_size": [8, 8]}
    return tr.InternVLForConditionalGeneration(
        tr.InternVLConfig(
            text_config=tr.Qwen2Config(**_TEXT),
            vision_config=tr.InternVLVisionConfig(**{**_VISION, **sides}),
            image_token_id=IMAGE,
            downsample_ratio=1.0,
        )
    )


#: Name → (builder, path of the language part, of the vision part, LoRA's layers in the latter).
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str, set[str]]] = {
    "llava": (_llava, "model.language_model", "model.vision_tower", {"q_proj", "v_proj"}),
    "gemma3": (_gemma3, "model.language_model", "model.vision_tower", {"q_proj", "v_proj"}),
    "idefics2": (_idefics2, "model.text_model", "model.vision_model", {"q_proj", "v_proj"}),
    "idefics3": (_idefics3, "model.text_model", "model.vision_model", {"q_proj", "v_proj"}),
    "mistral3": (_mistral3, "model.language_model", "model.vision_tower", {"q_proj", "v_proj"}),
    "internvl": (_internvl, "model.language_model", "model.vision_tower", {"q_proj", "v_proj"}),
    "qwen2_vl": (_qwen2_vl, "model.language_model", "model.visual", {"qkv"}),
    "qwen2_5_vl": (_qwen2_5_vl, "model.language_model", "model.visual", {"qkv"}),
    "qwen3_vl": (_qwen3_vl, "model.language_model", "model.visual", {"qkv"}),
}


def built(name: str) -> nn.Module:
    """Return the model, with the same values each time."""
    torch.manual_seed(0)
    return MODELS[name][0]().train()


def inputs(name: str) -> dict[str, Tensor]:
    """Return a batch of two samples with one image each."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, LENGTH), generator=g)
    ids[:, 1 : 1 + TOKENS] = IMAGE
    labels = ids.masked_fill(ids == IMAGE, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    is_image = (ids == IMAGE).long()
    if name.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * 2)
        pixels = torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=g)
        return {
            **batch,
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "mm_token_type_ids": is_image,
        }
    images = (2, 1) if name.startswith("idefics") else (2,)
    pixels = torch.randn(*images, 3, 16, 16, generator=g)
    further = {}
    if name == "gemma3":
        further["token_type_ids"] = is_image
    if name == "mistral3":
        further["image_sizes"] = torch.tensor([[16, 16]] * 2)
    return {**batch, "pixel_values": pixels, **further}
