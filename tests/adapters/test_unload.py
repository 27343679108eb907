"""A plain model comes out: the library's classes, keys and config, read back strictly."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, randomise, run

NF4 = lp.Quantization("nf4", block_size=32)


def llama(**settings) -> nn.Module:
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()


IDS = torch.arange(14).reshape(2, 7)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def reloaded(model: nn.Module, path: Path) -> nn.Module:
    """The model, saved by transformers and read back; every key must be there and none more."""
    model.save_pretrained(path)
    fresh, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return fresh


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("tied", "saved", "stays_tied"),
    [
        (False, ["lm_head"], False),
        (True, [], True),
        (True, ["embed_tokens", "lm_head"], True),
        (True, ["lm_head"], False),
    ],
)
def test_save_pretrained_and_back(tied, saved, stays_tied, quantization, tmp_path) -> None:
    model = llama(tie_word_embeddings=tied)
    before = classes(model), set(model.state_dict())
    lp.attach(model, lp.LoRA(r=4), quantization=quantization, modules_to_save=saved)
    randomise(model, std=0.1)
    want = logits(model)
    assert lp.merge_and_unload(model) is model
    assert (classes(model), set(model.state_dict())) == before
    assert_close("unloaded", logits(model), want, floor=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stays_tied
    assert model.config.tie_word_embeddings == stays_tied
    assert_same_bits("reloaded", logits(reloaded(model, tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert", "t5", "vit"])
def test_packed_layers_of_every_kind_become_dense(name) -> None:
    model, inputs = build(name)
    before, keys = classes(model), {k: (t.dtype, t.shape) for k, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    lp.attach(model, lp.LoRA(r=2), quantization=NF4)
    randomise(model, std=0.05)
    want = run(model, inputs)
    lp.merge_and_unload(model)
    assert classes(model) == before
    assert {k: (t.dtype, t.shape) for k, t in model.state_dict().items()} == keys
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert_close("unloaded", run(model, inputs), want, floor=1e-4)


def test_layers_of_bitsandbytes_become_linear() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    # bitsandbytes' kernels for AVX-512 misread rows that are shorter than a block of 64.
    model = llama(hidden_size=64)
    keys = set(model.state_dict())
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            old = getattr(layer.self_attn, name)
            packed = bnb.nn.Linear4bit(*reversed(old.weight.shape), bias=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(old.weight.data, quant_type="nf4", blocksize=64)
            packed.support_avx512bf16_for_cpu = False  # else it computes in bf16
            setattr(layer.self_attn, name, packed.to("cpu"))
    model.config.quantization_config = {"load_in_4bit": True}
    lp.attach(model, lp.LoRA(r=2))
    randomise(model, std=0.1)
    with torch.no_grad():  # in eval mode bitsandbytes rounds the scales on an AVX-512 CPU
        want = model.train()(IDS).logits
    lp.merge_and_unload(model)
    assert set(model.state_dict()) == keys
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear  # was not adapted
    assert not hasattr(model.config, "quantization_config")
    assert_close("unloaded", logits(model), want, floor=1e-4)


def test_detach_after_a_final_merge_does_the_same(tmp_path) -> None:
    model, other = llama(), None
    lp.attach(model, lp.LoRA(r=4), quantization=NF4)
    randomise(model, std=0.1)
    other = copy.deepcopy(model)
    lp.merge(model, keep_base=False)
    lp.detach(model)
    lp.merge_and_unload(other)
    assert set(model.state_dict()) == set(other.state_dict())
    for key, value in model.state_dict().items():
        assert_same_bits(key, value, other.state_dict()[key])
    assert_same_bits("reloaded", logits(reloaded(model, tmp_path)), logits(other))


def test_detach_of_a_merge_that_can_be_undone_is_refused() -> None:
    model = llama()
    lp.attach(model, lp.LoRA(r=4))
    lp.merge(model)
    with pytest.raises(RuntimeError, match=r"found \['default'\] merged; call unmerge.*merge_and"):
        lp.detach(model)


def test_a_merge_into_the_storage_stays_packed_when_detached() -> None:
    model = llama()
    lp.attach(model, lp.LoRA(r=4), quantization=NF4)
    lp.merge(model, into="storage", keep_base=False)
    with pytest.raises(RuntimeError, match="merged"):
        lp.detach(model)


def test_a_base_without_an_adapter_is_dequantised_too() -> None:
    model = llama()
    lp.quantize(model, NF4)
    want = logits(model)
    lp.merge_and_unload(model)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert_close("dense", logits(model), want, floor=1e-5)


def test_a_narrow_dtype_leaves_the_rotary_frequencies_exact(tmp_path) -> None:
    model = llama()
    lp.attach(model, lp.LoRA(r=4))
    lp.merge_and_unload(model, dtype="bfloat16")
    fresh = reloaded(model, tmp_path)
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    assert torch.equal(logits(model), logits(fresh))


def test_dtype_casts_the_model_and_its_config(tmp_path) -> None:
    model = llama()
    lp.attach(model, lp.LoRA(r=4), quantization=NF4)
    lp.merge_and_unload(model, dtype="bfloat16")
    fresh = reloaded(model, tmp_path)
    assert {t.dtype for t in fresh.state_dict().values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="floating dtype such as 'bfloat16', got 'int8'"):
        lp.merge_and_unload(model, dtype="int8")


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (lp.PromptTuning(2), "no merged form"),
        (lp.LoRA(r=2, lora_bias=True), "bias by LoRA on a layer without a bias"),
    ],
)
def test_what_no_plain_model_can_hold_is_refused(method, match) -> None:
    model = llama()
    lp.attach(model, method)
    randomise(model, std=0.1)
    want, before = logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=match):
        lp.merge_and_unload(model)
    assert_same_bits("as before", logits(model), want)
    assert model.state_dict().keys() == before.keys()


def test_a_model_without_adapters_is_named() -> None:
    with pytest.raises(ValueError, match="expected a model with adapters, got a LlamaForCausalLM"):
        lp.merge_and_unload(llama())


# ---- save_pretrained of a model that still has its adapters


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("into", ["dense", "storage"])
@pytest.mark.parametrize(
    ("tied", "saved"),
    [(False, []), (True, []), (True, ["embed_tokens", "lm_head"]), (True, ["lm_head"])],
)
def test_a_merged_model_is_saved_as_a_plain_one(tied, saved, into, quantization, tmp_path) -> None:
    model = llama(tie_word_embeddings=tied)
    keys = set(model.state_dict())
    lp.attach(model, lp.LoRA(r=4), quantization=quantization, modules_to_save=saved)
    randomise(model, std=0.1)
    lp.merge(model, into=into)
    fresh = reloaded(model, tmp_path)
    assert_same_bits("reloaded", logits(fresh), logits(model))
    assert set(fresh.state_dict()) == keys
    lp.unmerge(model)
    assert any(".peft." in key for key in model.state_dict())


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
def test_saving_with_an_adapter_that_acts_is_refused(quantization, tmp_path) -> None:
    model = llama()
    lp.attach(model, lp.LoRA(r=4), quantization=quantization)
    for each in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(
            RuntimeError, match=r"adapters \['default'\] that act.*merge_and_unload"
        ):
            each.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    lp.set_adapter(model, None)
    assert_same_bits("the base", logits(reloaded(model, tmp_path)), logits(model))


def test_a_base_that_is_only_quantised_is_saved_dequantised(tmp_path) -> None:
    model = llama()
    lp.quantize(model, NF4)
    assert_same_bits("reloaded", logits(reloaded(model, tmp_path)), logits(model))


def test_the_notes_for_saving_go_with_the_adapters() -> None:
    model = llama()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    lp.attach(model, lp.LoRA(r=4))
    lp.detach(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == {
        name: set(attributes) for name, attributes in before.items()
    }


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_model_is_unmerged_alone(copied, quantization) -> None:
    model = llama(tie_word_embeddings=True)
    lp.attach(model, lp.LoRA(r=4, target_modules=["q_proj", "lm_head"]), quantization=quantization)
    randomise(model, std=0.1)
    adapted = logits(model)
    lp.merge(model)
    merged = logits(model)
    other = copied(model)
    lp.unmerge(other)
    assert_same_bits("the copy", logits(other), adapted)
    assert_same_bits("the original", logits(model), merged)
    lp.unmerge(model)
    assert_same_bits("both", logits(model), adapted)


def test_weights_that_were_tied_are_named() -> None:
    model = llama(tie_word_embeddings=True)
    lp.attach(model, lp.LoRA(r=2, target_modules=["lm_head", "q_proj"]))
    randomise(model)
    before = logits(model)
    with pytest.warns(UserWarning, match="embed_tokens.weight, lm_head.weight were tied, and the"):
        lp.merge_and_unload(model)
    assert_close("logits", logits(model), before)


def shared_embeddings(kind: str) -> nn.Module:
    """A model whose embedding lies under `shared`, in encoder, decoder and output head."""
    torch.manual_seed(0)
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                decoder_start_token_id=0,
            )
        ).eval()  # fmt: skip
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
            decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=16, forced_eos_token_id=2,
        )
    ).eval()  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*were tied")
@pytest.mark.parametrize("how", ["merge", "merge_and_unload"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("saved", ["shared", "lm_head", "encoder.embed_tokens"])
def test_one_of_several_tied_embeddings_changed(
    kind: str, saved: str, how: str, tmp_path: Path
) -> None:
    model = shared_embeddings(kind)
    ties = model.state_dict(keep_vars=True)
    lp.attach(model, lp.LoRA(r=2), modules_to_save=[saved])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))

    def outputs(of: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of.eval()(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits

    before = outputs(model)
    getattr(lp, how)(model)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_close("loaded", outputs(loaded), before)
    if how == "merge":
        lp.unmerge(model)
        assert_same_bits("unmerged", outputs(model), before)
        assert model.config.tie_word_embeddings
        plain = {k: id(t) for k, t in model.state_dict(keep_vars=True).items() if k in ties}
        assert plain == {k: id(ties[k]) for k in plain}
