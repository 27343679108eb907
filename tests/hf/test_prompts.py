"""Prompts and prefixes to and from Hugging Face peft: same logits, both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.methods import HardPrompt, PrefixTuning, PromptTuning, PTuning
from lightning_peft.methods.base import SequenceMethod
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise, run
from tests.helpers.tiny_models import BUILDERS, KINDS, example_inputs

FLOOR = 1e-5
N = 3
OURS: dict[str, SequenceMethod] = {
    "prompt": PromptTuning(n=N),
    "mlp": PTuning(n=N, hidden=16),
    "lstm": PTuning(n=N, encoder="lstm", hidden=8),
    "prefix": PrefixTuning(n=N),
    "projection": PrefixTuning(n=N, projection=True, hidden=16),
}
THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "lstm": (
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8},
    ),
    "prefix": (peft.PrefixTuningConfig, {}),
    "projection": (
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 16},
    ),
}
TASKS = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder_decoder": "SEQ_2_SEQ_LM"}
TOKENS = [n for n in BUILDERS if KINDS[n] in TASKS]
# What peft itself cannot make or run, and what no prefix fits into.
NOT_IN_PEFT = {"mamba", "mamba2", "distilbert", "electra", "albert", "mpt", "whisper"}
NO_PREFIX = {"mamba", "mamba2", "modernbert", "distilbert", "deepseek_v3", "albert", "esm", "jamba"}
NO_PREFIX |= {"deberta-v2", "deberta_v2", "convbert", "zamba"}


def strip(y: Tensor, like: Tensor) -> Tensor:
    """peft's logits are n longer."""
    return y[:, -like.shape[1] :] if y.dim() == 3 else y


def both_ways(base: nn.Module, x: dict[str, Tensor], kind: str, task: str, path: Path) -> None:
    model = copy.deepcopy(base)
    lp.attach(model, OURS[kind])
    randomise(model, std=0.5)
    want = run(model, x)
    assert not torch.equal(want, run(base, x)), "the adapter does nothing"
    lp.save_adapter(model, path / "ours")
    theirs = in_peft(base, path / "ours")
    assert_close("ours in peft", strip(run(theirs, x), want), want, floor=FLOOR)
    assert_close("ours again", run(loaded(base, path / "ours"), x), want, floor=FLOOR)

    cls, fields = THEIRS[kind]
    config = cls(task_type=task, num_virtual_tokens=N, **fields)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs, std=0.5)
    theirs.save_pretrained(str(path / "theirs"))
    got = run(loaded(base, path / "theirs"), x)
    assert_close("theirs in ours", got, strip(run(theirs, x), got), floor=FLOOR)


FAST = ["llama", "gpt2", "bert", "t5"]


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TOKENS]
)
def test_architectures(name: str, kind: str, tmp_path: Path) -> None:
    prefix = kind in ("prefix", "projection")
    if name in NOT_IN_PEFT:
        pytest.skip("peft cannot make one")
    if prefix and name in NO_PREFIX:
        pytest.skip("its layers take no prefix")
    if prefix and name == "falcon":
        pytest.skip("peft makes a prefix for all heads where one is kept")
    if prefix and KINDS[name] == "encoder_decoder":
        pytest.skip("even number of decoder layers: see test_prefix_of_an_encoder_decoder")
    base, x = build(name)
    both_ways(base, x, kind, TASKS[KINDS[name]], tmp_path)


def encoder_decoder(layers: int) -> nn.Module:
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64}
    config = tr.T5Config(**sizes, num_layers=layers, num_heads=4, decoder_start_token_id=0)
    return tr.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["prefix", "projection"])
@pytest.mark.parametrize("layers", [1, 3])
def test_prefix_of_an_encoder_decoder(kind: str, layers: int, tmp_path: Path) -> None:
    both_ways(encoder_decoder(layers), example_inputs("t5"), kind, "SEQ_2_SEQ_LM", tmp_path)


def test_prefix_of_an_even_number_of_decoder_layers(tmp_path: Path) -> None:
    """peft's layout shares rows there: what it wrote is read and written again, ours is refused."""
    base, x = encoder_decoder(4), example_inputs("t5")
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs, std=0.5)
    theirs.save_pretrained(str(tmp_path))
    model = loaded(base, tmp_path)
    want = run(model, x)
    assert_close("theirs in ours", want, run(theirs, x), floor=FLOOR)
    lp.save_adapter(model, tmp_path / "again")
    assert_close("again in peft", run(in_peft(base, tmp_path / "again"), x), want, floor=FLOOR)
    randomise(model)
    with pytest.raises(ValueError, match="one prefix for two layers"):
        lp.save_adapter(model, tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generation_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    base, _ = build("llama")
    model = copy.deepcopy(base)
    lp.attach(model, OURS[kind])
    randomise(model, std=0.5)
    lp.save_adapter(model, tmp_path)
    ids = torch.randint(3, 99, (2, 5))
    options: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
    }
    theirs: Any = in_peft(base, tmp_path)
    ours: Any = model
    assert torch.equal(ours.generate(**options), theirs.generate(**options))


def test_loss_is_that_of_peft(tmp_path: Path) -> None:
    """peft also counts the first token of the text, as predicted from the prompt."""
    base, x = build("gpt2")
    x["labels"][:, 0] = -100
    for kind in ("prompt", "prefix"):
        model = copy.deepcopy(base)
        lp.attach(model, OURS[kind])
        randomise(model, std=0.5)
        lp.save_adapter(model, tmp_path / kind)
        assert_close("loss", model(**x).loss, in_peft(base, tmp_path / kind)(**x).loss, floor=1e-5)


def test_files(tmp_path: Path) -> None:
    """The tensor alone, without the network; what peft needs to know of the model."""
    base, _ = build("llama")
    model = copy.deepcopy(base)
    lp.attach(model, OURS["projection"])
    lp.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: list(t.shape) for k, t in tensors.items()} == {"prompt_embeddings": [N, 64]}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": N,
        "token_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "prefix_projection": False,
    }
    assert {k: config[k] for k in wanted} == wanted
    again = loaded(base, tmp_path)
    assert_same_bits("exported again", _table(again), tensors["prompt_embeddings"])


def _table(model: nn.Module) -> Tensor:
    (table,) = lp.adapter_state_dict(model).values()
    return table


def test_trained_head(tmp_path: Path) -> None:
    base, x = build("bert")
    model = copy.deepcopy(base)
    lp.attach(model, OURS["prompt"], modules_to_save=["classifier"])
    randomise(model, std=0.5)
    lp.save_adapter(model, tmp_path)
    assert "base_model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    want = run(model, x)
    assert_close("in peft", run(in_peft(base, tmp_path), x), want, floor=FLOOR)
    assert_close("again", run(loaded(base, tmp_path), x), want, floor=FLOOR)


def test_hard_prompt_goes_out_as_its_tokens(tmp_path: Path) -> None:
    base, x = build("gpt2")
    model = copy.deepcopy(base)
    lp.attach(model, HardPrompt(n=N))
    randomise(model, std=0.5)
    lp.save_adapter(model, tmp_path)
    rows = base.get_input_embeddings().weight[lp.hard_prompt_ids(model)]
    written = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert_close("rows", written, rows.detach())
    want = run(model, x)
    assert_close("in peft", strip(run(in_peft(base, tmp_path), x), want), want, floor=FLOOR)


def test_added_prompts_have_no_equal(tmp_path: Path) -> None:
    model, _ = build("gpt2")
    lp.attach(model, PromptTuning(n=N, mode="add"))
    with pytest.raises(ValueError, match="added"):
        lp.save_adapter(model, tmp_path)


@pytest.mark.parametrize("kind", ["prompt", "mlp", "prefix"])
@pytest.mark.parametrize("wrong", ["shape", "missing", "extra", "n", "nan"])
def test_bad_files(kind: str, wrong: str, tmp_path: Path) -> None:
    base, _ = build("llama")
    model = copy.deepcopy(base)
    lp.attach(model, OURS[kind])
    lp.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    P = tensors["prompt_embeddings"]
    if wrong == "shape":
        tensors["prompt_embeddings"] = P[:, :-1].contiguous()
    elif wrong == "missing":
        del tensors["prompt_embeddings"]
    elif wrong == "extra":
        tensors["base_model.model.other"] = torch.zeros(2)
    elif wrong == "nan":
        P[0, 0] = float("nan")
    else:
        config["num_virtual_tokens"] = N + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"prompt_embeddings|other"):
        lp.load_adapter(base, tmp_path)
    assert not any("peft" in n for n in base.state_dict())
    assert all(p.requires_grad for p in base.parameters())


def _gemma4(shared: int) -> Any:
    config = tr.Gemma4TextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        sliding_window=4,
        num_kv_shared_layers=shared,
        hidden_size_per_layer_input=8 if shared else 0,
        vocab_size_per_layer_input=99,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return tr.Gemma4ForCausalLM(config).eval()


@pytest.mark.parametrize("shared", [0, 2])
def test_prefixes_of_layers_with_different_heads(shared: int, tmp_path: Path) -> None:
    """Gemma 4: the width of keys varies, and the last layers read those of earlier ones."""
    model = _gemma4(shared)
    lp.attach(model, lp.PrefixTuning(n=3))
    randomise(model)
    (table,) = lp.adapter_state_dict(model).values()
    assert table.shape == (3, 2 * 2 * (8 + 16) * (4 - shared) // 2)
    ids = torch.randint(3, 99, (2, 9))
    stepwise, tokens = [], ids
    for _ in range(3):
        with torch.no_grad():
            stepwise.append(model(input_ids=tokens).logits[:, -1].argmax(-1))
        tokens = torch.cat([tokens, stepwise[-1][:, None]], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    (prefix,) = (p for p in model.parameters() if p.requires_grad)
    want = prefix.grad.clone()
    prefix.grad = None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=ids, labels=ids).loss.backward()
    assert_close("with checkpointing", prefix.grad, want, floor=1e-6)
    with pytest.raises(ValueError, match="different heads"):
        lp.save_adapter(model, tmp_path)


def test_advice_for_whisper_works() -> None:
    base, inputs = build("whisper")
    with pytest.raises(ValueError, match="use an adapter of layers, as LoRA") as refusal:
        lp.attach(base, lp.PrefixTuning(n=3))
    assert "PromptTuning" not in str(refusal.value)
    lp.attach(base, lp.LoRA(r=2))
    base(**inputs).loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_sliding_windows_under_checkpointing(reentrant: bool) -> None:
    """A prefix shorter than the window, and a text longer than it."""
    torch.manual_seed(0)
    config = copy.deepcopy(BUILDERS["mistral"]().config)
    config.sliding_window = 4
    base, ids = tr.MistralForCausalLM(config), torch.randint(3, 99, (2, 9))
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(base).train()
        lp.attach(model, PrefixTuning(n=N))
        randomise(model)
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(next(p.grad for p in model.parameters() if p.requires_grad))
    assert_close("gradient", gradients[1], gradients[0], floor=1e-6)
