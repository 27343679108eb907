"""LoRA files of single experts (transformers 4): into the fused weights, against the formula and
against peft, which converts Mixtral's too.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.layers.experts.ops import is_experts
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, in_peft, loaded, run

MIXTRAL = ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})
QWEN = ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
NAMES = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN,
    "olmoe": QWEN,
    "deepseek_v3": QWEN,
}
R, ALPHA = 3, 5.0


def old_file(base, name, parts, *, router=False, rslora=False):
    """(config, tensors, the base with the changes added in fp64) of a random adapter."""
    parent, leaves = NAMES[name]
    s = ALPHA / (math.sqrt(R) if rslora else R)
    g = torch.Generator().manual_seed(5)
    tensors, edited = {}, copy.deepcopy(base)

    def pair(path, out, inner):
        A = 0.3 * torch.randn(R, inner, generator=g)
        B = 0.3 * torch.randn(out, R, generator=g)
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
        return (s * (B.double() @ A.double())).float()

    for i, layer in enumerate(edited.model.layers):
        q = next(
            m for n, m in layer.named_modules() if n in ("self_attn.q_proj", "self_attn.q_a_proj")
        )
        leaf = "q_a_proj" if hasattr(layer.self_attn, "q_a_proj") else "q_proj"
        q.weight.data += pair(f"model.layers.{i}.self_attn.{leaf}", *q.weight.shape)
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue
        inner = experts.down_proj.shape[2]
        rows = {"gate": slice(0, inner), "up": slice(inner, None)}
        for e in range(experts.num_experts):
            for part in parts:
                W = experts.down_proj if part == "down" else experts.gate_up_proj
                view = W.data[e] if part == "down" else W.data[e][rows[part]]
                view += pair(f"model.layers.{i}.{parent}.experts.{e}.{leaves[part]}", *view.shape)
        if router:
            gate = layer.mlp.gate
            gate.weight.data += pair(f"model.layers.{i}.{parent}.gate", *gate.weight.shape)
    targets = [leaf, *(leaves[p] for p in parts), *(["gate"] if router else [])]
    config = {
        "peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": targets,
        "use_rslora": rslora, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x",
    }  # fmt: skip
    return config, tensors, edited


def written(folder: Path, config, tensors) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("parts", [("gate", "up", "down"), ("gate", "up"), ("down",), ("up",)])
@pytest.mark.parametrize("name", NAMES)
def test_into_the_fused_weights(name, parts, tmp_path: Path) -> None:
    base, inputs = build(name)
    config, tensors, edited = old_file(base, name, parts)
    if name == "deepseek_v3" and set(parts) & {"gate", "up", "down"}:
        # Its dense and shared feed-forward layers bear the experts' names: listed by full name.
        config["target_modules"] = [t for t in config["target_modules"] if t == "q_a_proj"]
    model = loaded(base, written(tmp_path, config, tensors))
    assert_close("logits", run(model, inputs), run(edited, inputs), floor=1e-4)
    ranks = {a.site.parameter: a.A.shape[-2] for _, m in adapted_modules(model) if is_experts(m)
             for a in m.peft.default.children()}  # fmt: skip
    both = 2 * R if {"gate", "up"} <= set(parts) else R
    assert ranks.get("gate_up_proj", both) == both
    assert ranks.get("down_proj", R) == R
    lp.merge(model)
    assert_close("merged", run(model, inputs), run(edited, inputs), floor=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_router_and_root_scaling(rslora, tmp_path: Path) -> None:
    base, inputs = build("mixtral")
    made = old_file(base, "mixtral", ("gate", "up", "down"), router=True, rslora=rslora)
    model = loaded(base, written(tmp_path, *made[:2]))
    assert_close("logits", run(model, inputs), run(made[2], inputs), floor=1e-4)


def test_as_peft_reads_it(tmp_path: Path) -> None:
    base, inputs = build("mixtral")
    config, tensors, _ = old_file(base, "mixtral", ("gate", "up", "down"))
    written(tmp_path, config, tensors)
    want = run(in_peft(base, tmp_path), inputs)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=1e-4)
    lp.save_adapter(model, tmp_path / "again")
    assert_close("in peft again", run(in_peft(base, tmp_path / "again"), inputs), want, floor=1e-4)


def _drop(key):
    return lambda t: {k: v for k, v in t.items() if key not in k}


def _thirteenth(t):
    return t | {
        k.replace("experts.0.", "experts.13."): v.clone() for k, v in t.items() if "experts.0." in k
    }


def _narrow(t):
    key = next(k for k in t if "experts.1.w1.lora_A" in k)
    return t | {
        key: t[key][:2].contiguous(),
        key.replace("_A", "_B"): t[key.replace("_A", "_B")][:, :2].contiguous(),
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_drop("layers.1.block_sparse_moe.experts.2.w1"), "missing .*2, 'gate'"),
        (_drop("experts.2.w2.lora_B"), "missing .*2, 'down', 'B'"),
        (_thirteenth, "extra .*13"),
        (_narrow, "one rank"),
        (lambda t: {k.replace("layers.1.", "layers.7."): v for k, v in t.items()}, "layers.7"),
    ],
)
def test_incomplete_files_are_refused(change, why, tmp_path: Path) -> None:
    base, _ = build("mixtral")
    config, tensors, _ = old_file(base, "mixtral", ("gate", "up", "down"))
    written(tmp_path, config, change(tensors))
    before = set(base.state_dict())
    with pytest.raises(ValueError, match=why):
        lp.load_adapter(base, tmp_path)
    assert set(base.state_dict()) == before


def test_dora_of_single_experts_is_refused(tmp_path: Path) -> None:
    base, _ = build("mixtral")
    config, tensors, _ = old_file(base, "mixtral", ("down",))
    written(tmp_path, config | {"use_dora": True}, tensors)
    with pytest.raises(ValueError, match="got DoRA; merge"):
        lp.load_adapter(base, tmp_path)
