"""LoRA to and from Hugging Face peft: same logits both ways, after merging, on many
architectures.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import ARCHITECTURES, build, by_peft, in_peft, loaded, run, trained

FLOOR = 1e-4  # fp32 logits, relative to the largest
TARGETS = {"usual": None, "all-linear": "all-linear"}


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ours_in_peft(name: str, targets: str, tmp_path: Path) -> None:
    base, inputs = build(name)
    model = trained(base, lp.LoRA(r=2, alpha=4, target_modules=TARGETS[targets]))
    lp.save_adapter(model, tmp_path)
    want = run(model, inputs)
    assert not torch.equal(want, run(base, inputs)), "the adapter does nothing"
    assert_close("logits in peft", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)
    again = loaded(base, tmp_path)
    assert_same_bits("logits after reload", run(again, inputs), want)
    lp.merge(again)
    assert_close("logits after merge", run(again, inputs), want, floor=FLOOR)
    lp.unmerge(again)
    assert_same_bits("logits after unmerge", run(again, inputs), want)


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "resnet"])
def test_peft_in_ours(name: str, targets: str, tmp_path: Path) -> None:
    base, inputs = build(name)
    try:
        theirs = by_peft(base, tmp_path, r=4, lora_alpha=8, target_modules=TARGETS[targets])
    except ValueError as error:
        # peft's table has no row for it, ours has: the other direction tests that.
        if targets != "usual" or "Please specify `target_modules`" not in str(error):
            raise
        return
    want = run(theirs, inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    lp.merge(model)
    assert_close("logits after merge", run(model, inputs), want, floor=FLOOR)


# name → (architecture, our arguments, arguments of attach)
OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"v_proj": 5.0},
        },
        {},
    ),
    "rslora": ("llama", {"use_rslora": True, "alpha": 3.0}, {}),
    "lora_bias": ("bert", {"lora_bias": True}, {}),
    "bias lora_only": ("bert", {"bias": "lora_only"}, {}),
    "bias all": ("bert", {"bias": "all"}, {}),
    "head": ("bert", {}, {"modules_to_save": ["classifier"]}),
    "head of two": ("roberta", {}, {"modules_to_save": ["classifier"]}),
    "head with a longer namesake": ("distilbert", {}, {"modules_to_save": ["classifier"]}),
    "some layers": ("llama", {"target_modules": "all-linear", "layers_to_transform": [1]}, {}),
    "regex": ("llama", {"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"}, {}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "scaled embedding": ("gemma2", {"target_modules": ["embed_tokens"]}, {}),
    "untied head": ("llama", {"target_modules": ["lm_head"]}, {}),
    "gpt2 rslora": ("gpt2", {"target_modules": "all-linear", "use_rslora": True}, {}),
    "convolutions": ("resnet", {"target_modules": ["convolution"]}, {}),
    "depthwise": ("convnext", {"target_modules": ["dwconv", "pwconv1"], "r": 1}, {}),
    "pissa": ("llama", {"init": "pissa"}, {}),
    "olora rslora": ("llama", {"init": "olora", "use_rslora": True}, {}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, tmp_path: Path) -> None:
    name, arguments, more = OPTIONS[option]
    base, inputs = build(name)
    model = trained(base, lp.LoRA(**{"r": 4, "alpha": 8.0, **arguments}), **more)
    lp.save_adapter(model, tmp_path)
    want = run(model, inputs)
    assert not torch.equal(want, run(base, inputs)), "the adapter does nothing"
    assert_close("logits in peft", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)
    assert_close("logits in ours", run(loaded(base, tmp_path), inputs), want, floor=FLOOR)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "llama",
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
        ),
        ("llama", {"use_rslora": True}),
        ("llama", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "olora"}),
        ("llama", {"target_modules": r".*\.(q|k)_proj", "layers_to_transform": None}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["lm_head"]}),
        ("bert", {"bias": "all"}),
        ("bert", {"bias": "lora_only"}),
        ("bert", {"lora_bias": True}),
        ("bert", {"task_type": "SEQ_CLS"}),
        ("distilbert", {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]}),
        ("bert", {"target_modules": "all-linear", "r": 8}),  # r above the head's 3 classes
        ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    ],
    ids=str,
)
def test_options_of_peft(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    base, inputs = build(name)
    theirs = by_peft(base, tmp_path, **{"r": 4, "lora_alpha": 8, **config})
    want = run(theirs, inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    lp.save_adapter(model, tmp_path / "again")
    again = in_peft(base, tmp_path / "again")
    assert_close("logits in peft again", run(again, inputs), want, floor=FLOOR)


def test_files(tmp_path: Path) -> None:
    base, _ = build("llama")
    lp.save_adapter(trained(base, lp.LoRA(r=4, alpha=8.0)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert config["target_modules"] == ["q_proj", "v_proj"]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_keys_are_those_of_peft(bias: str, tmp_path: Path) -> None:
    base, _ = build("bert")
    by_peft(base, tmp_path / "theirs", r=4, bias=bias, target_modules=["query"])
    lp.save_adapter(
        trained(base, lp.LoRA(r=4, bias=bias, target_modules=["query"])),  # type: ignore[arg-type]
        tmp_path / "ours",
    )
    ours, theirs = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    )
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}


class Attention(nn.Module):
    """`nn.MultiheadAttention`, whose projections peft keeps in a place of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        out: torch.Tensor = self.out(y)
        return out


def test_multihead_attention(tmp_path: Path) -> None:
    torch.manual_seed(7)
    base, x = Attention().eval(), torch.randn(2, 5, 16)
    model = trained(base, lp.LoRA(r=2, target_modules=["attention", "out"]))
    lp.save_adapter(model, tmp_path)
    with torch.no_grad():
        want = model(x)
        assert_close("in peft", in_peft(base, tmp_path)(x), want, floor=FLOOR)
        assert_same_bits("in ours", loaded(base, tmp_path)(x), want)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y


def test_grouped_convolution(tmp_path: Path) -> None:
    """One rank for all groups here, a block of ranks a group in peft: exact, also when merged."""
    torch.manual_seed(7)
    base, x = Grouped().eval(), torch.randn(2, 8, 6, 6)
    model = trained(base, lp.LoRA(r=3, alpha=6.0, target_modules=["conv"]))
    lp.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 24)
    with torch.no_grad():
        want = model(x)
        assert_close("in peft", in_peft(base, tmp_path)(x), want, floor=FLOOR)
        again = loaded(base, tmp_path)
        assert_close("in ours", again(x), want, floor=FLOOR)
        lp.merge(again)
        assert_close("merged", again(x), want, floor=FLOOR)


def test_grouped_convolution_of_peft_mixes_channels(tmp_path: Path) -> None:
    base = Grouped().eval()
    by_peft(base, tmp_path, r=4, target_modules=["conv"])
    with pytest.raises(ValueError, match="equal diagonal blocks"):
        loaded(base, tmp_path)


def test_several_adapters(tmp_path: Path) -> None:
    base, inputs = build("llama")
    model = trained(base, lp.LoRA(r=2))
    lp.attach(model, lp.LoRA(r=3, target_modules="all-linear"), adapter_name="second")
    from tests.helpers.peft_exchange import randomise

    randomise(model, seed=9)
    for name in ("default", "second"):
        lp.save_adapter(model, tmp_path, adapter_name=name)
    assert (tmp_path / "second" / "adapter_config.json").is_file()
    theirs: Any = in_peft(base, tmp_path)
    theirs.load_adapter(str(tmp_path / "second"), "second")
    ours = copy.deepcopy(base)
    for name in ("default", "second"):
        lp.load_adapter(ours, tmp_path, adapter_name=name)
    for name in ("default", "second"):
        for m in (model, ours):
            lp.set_adapter(m, name)
        theirs.set_adapter(name)
        want = run(model, inputs)
        assert_close(f"{name} in peft", run(theirs, inputs), want, floor=FLOOR)
        assert_close(f"{name} in ours", run(ours, inputs), want, floor=FLOOR)


class Holder(nn.Module):
    """A module around the model, as a LightningModule is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.mark.parametrize("patterns", [{}, {"q_proj": 2}], ids=["one rank", "patterns"])
def test_a_module_that_holds_the_model(patterns: dict[str, int], tmp_path: Path) -> None:
    base, inputs = build("llama")
    holder = Holder(copy.deepcopy(base))
    lp.attach(holder, lp.LoRA(r=4, rank_pattern=patterns, target_modules=["q_proj", "v_proj"]))
    from tests.helpers.peft_exchange import randomise

    randomise(holder)
    lp.save_adapter(holder, tmp_path)
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(k.startswith("base_model.model.model.layers.") for k in keys)
    want = run(holder.net, inputs)
    assert_close("in peft", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)
    other = Holder(copy.deepcopy(base))
    lp.load_adapter(other, tmp_path)
    assert_same_bits("in a holder", run(other.net, inputs), want)


def test_root_is_the_callers_choice(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    holder = Holder(plain)
    lp.attach(holder, lp.LoRA(r=2, target_modules=["0"]))
    lp.save_adapter(holder, tmp_path, root="net")
    (key, *_) = load_file(tmp_path / "adapter_model.safetensors")
    assert key == "base_model.model.0.lora_A.weight"
    other = Holder(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))
    lp.load_adapter(other, tmp_path, root="net")
    with pytest.raises(ValueError, match="children are"):
        lp.save_adapter(holder, tmp_path, root="nett")


def test_uniform(tmp_path: Path) -> None:
    """One rank, scale 1: what servers that drop patterns compute is right too."""
    base, inputs = build("llama")
    method = lp.LoRA(
        r=4,
        alpha=6.0,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 1.0},
        use_rslora=True,
    )
    model = trained(base, method)
    lp.save_adapter(model, tmp_path, uniform=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"] == 4
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {4}
    want = run(model, inputs)
    assert_close("in peft", run(in_peft(base, tmp_path), inputs), want, floor=FLOOR)
    assert_close("in ours", run(loaded(base, tmp_path), inputs), want, floor=FLOOR)


class Odd(nn.Module):
    """Layer names that look like parts of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict(
            {"weight": nn.Linear(6, 6), "adapters": nn.Linear(6, 6), "base_layer": nn.Linear(6, 6)}
        )
        self.base_layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.lora_A.values():
            x = layer(x)
        y: torch.Tensor = self.base_layer(x)
        return y


def test_odd_layer_names(tmp_path: Path) -> None:
    torch.manual_seed(7)
    base, x = Odd().eval(), torch.randn(3, 6)
    model = trained(base, lp.LoRA(r=2, target_modules=["weight", "adapters", "base_layer"]))
    lp.save_adapter(model, tmp_path)
    with torch.no_grad():
        assert_same_bits("in ours", loaded(base, tmp_path)(x), model(x))


@pytest.mark.parametrize("trained_too", [False, True])
def test_layers_that_nobody_calls(trained_too: bool, tmp_path: Path) -> None:
    """peft's all-linear takes ESM's contact head, whose adapter no training ever changes."""
    import peft
    from transformers import EsmConfig, EsmForMaskedLM

    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1,
        intermediate_size=64, mask_token_id=32, max_position_embeddings=64,
        position_embedding_type="rotary", emb_layer_norm_before=False, token_dropout=False,
    )  # fmt: skip
    base = EsmForMaskedLM(config).eval()
    settings = peft.LoraConfig(r=2, target_modules="all-linear")
    theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name and (trained_too or "contact_head" not in name):
                p.normal_(std=0.2)
    theirs.save_pretrained(str(tmp_path))
    if trained_too:
        with pytest.raises(ValueError, match=r"contact_head.regression: .* never called"):
            lp.load_adapter(base, tmp_path)
        return
    inputs = {"input_ids": torch.randint(4, 24, (2, 9))}
    want = run(theirs, inputs)
    report = lp.load_adapter(base, tmp_path)
    assert any("contact_head" in note for note in report.notes)
    assert_close("logits", run(base, inputs), want, floor=FLOOR)
