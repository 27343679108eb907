"""X-LoRA: peft's outputs and gradients, checkpointing, generation, and what a file keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules
from lightning_peft.strategies.sharding import _check_adapters
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, in_peft, loaded, randomise, run

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gemma2": ["q_proj", "down_proj"],
    "qwen3": ["v_proj", "up_proj"],
    "olmo2": ["q_proj", "down_proj"],
    "phi": ["q_proj", "fc2"],
}
NAMES = ["0", "1", "2"]


def experts(base: nn.Module, targets: list[str], folder: Path) -> dict[str, str]:
    for i in range(3):
        model = copy.deepcopy(base)
        lp.attach(model, lp.LoRA(r=2 + i, alpha=6.0, target_modules=targets))
        randomise(model, seed=i, std=0.3)
        lp.save_adapter(model, folder / str(i))
    return {n: str(folder / n) for n in NAMES}


def routed(base: nn.Module, paths: dict[str, str], **fields: Any) -> Any:
    model: Any = copy.deepcopy(base)
    for n, path in paths.items():
        lp.load_adapter(model, path, adapter_name=n)
    lp.attach(model, lp.XLoRA(adapters=NAMES, **fields), adapter_name="router")
    return model.eval()


FIELDS: list[dict[str, Any]] = [
    {},
    {"layerwise": True, "depth": 3, "hidden": 16, "dropout": 0.0, "temperature": 0.5},
    {"top_k": 2, "weight": 0.7},
    {"top_k": 2, "softmax": False, "softmax_top_k": True},
]
THEIRS = {
    "layerwise": "layerwise_scalings",
    "depth": "xlora_depth",
    "hidden": "xlora_size",
    "dropout": "xlora_dropout_p",
    "temperature": "softmax_temperature",
    "top_k": "top_k_lora",
    "softmax": "enable_softmax",
    "softmax_top_k": "enable_softmax_topk",
    "weight": "global_scaling_weight",
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_outputs_and_gradients_are_pefts(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    if name != "llama" and fields not in FIELDS[:2]:
        pytest.skip("one architecture for the choice of adapters")
    base, inputs = build(name)
    paths = experts(base, TARGETS[name], tmp_path)
    there: Any = copy.deepcopy(base)
    there.config.use_cache = False
    width = base.config.hidden_size  # type: ignore[union-attr]
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=width,
        adapters=paths,
        **{THEIRS[k]: v for k, v in fields.items()},
    )
    theirs: Any = peft.get_peft_model(there, config).eval()
    classifier = theirs.base_model.internal_xlora_classifier
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in classifier.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    ours = routed(base, paths, **fields)
    (holder,) = [m for _, m in adapted_modules(ours) if "router" in m.peft]
    block: Any = holder.peft["router"].block
    block.layers.load_state_dict(classifier.layers.state_dict())
    for model in (theirs, ours):
        y = model(**inputs).logits
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        (y * weight).sum().backward()
    assert_close("output", run(ours, inputs), run(theirs, inputs), floor=1e-5)
    assert (run(ours, inputs) - run(base, inputs)).norm() > 1e-3
    for mine, other in zip(block.parameters(), classifier.parameters(), strict=True):
        assert_close("gradient", mine.grad, other.grad, floor=1e-5)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert all(".peft.router.block.layers." in n for n in trained)

    lp.save_adapter(ours, tmp_path / "all", adapter_name="router")
    there = copy.deepcopy(base)
    there.config.use_cache = False
    again = in_peft(there, tmp_path / "all" / "router")
    assert_close("ours in peft", run(again, inputs), run(theirs, inputs), floor=1e-5)
    here: Any = copy.deepcopy(base)
    for n in NAMES:
        lp.load_adapter(here, tmp_path / "all", adapter_name=n)
    lp.load_adapter(here, tmp_path / "all", adapter_name="router")
    assert torch.equal(run(here.eval(), inputs), run(ours, inputs))


def test_training_the_adapters_too_under_checkpointing(tmp_path: Path) -> None:
    base, inputs = build("llama")
    paths = experts(base, ["q_proj", "v_proj"], tmp_path)
    found = []
    for checkpointing in (False, True):
        model = routed(base, paths, layerwise=True).train()
        lp.set_adapter(model, ["router", *NAMES])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        one = model(**{**inputs, "labels": inputs["input_ids"]}).loss
        two = model(**{**inputs, "labels": inputs["input_ids"].flip(0)}).loss
        one.backward()
        two.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert any(".peft.0." in n for n in found[0])
    for n, grad in found[0].items():
        assert grad is not None, n
        assert_close(n, found[1][n], grad, floor=1e-5)


def test_generation_resume_and_switching(tmp_path: Path) -> None:
    base, inputs = build("llama")
    paths = experts(base, ["q_proj", "v_proj"], tmp_path)
    model = routed(base, paths)
    randomise(model, std=0.5)
    ids = torch.randint(3, 90, (2, 5))
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    text = ids
    for _ in range(4):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, text)
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, use_cache=True)
    with lp.disable_adapters(model):
        assert torch.equal(run(model, inputs), run(base, inputs))
    want = run(model, inputs)
    lp.set_adapter(model, "1")
    assert_close("one expert", run(model, inputs), run(loaded(base, Path(paths["1"])), inputs))
    lp.set_adapter(model, "router")
    again = routed(base, paths)
    lp.load_adapter_state_dict(again, lp.adapter_state_dict(model))
    assert torch.equal(run(again, inputs), want)
    assert torch.equal(run(copy.deepcopy(model), inputs), want)
    lp.detach(model, "1")
    with pytest.raises(RuntimeError, match=r"\['1'\] are not attached"):
        run(model, inputs)
    lp.detach(model)
    assert torch.equal(run(model, inputs), run(base, inputs))


def test_refused(tmp_path: Path) -> None:
    base, inputs = build("llama")
    paths = experts(base, ["q_proj"], tmp_path)
    model = routed(base, paths)
    with pytest.raises(ValueError, match=r"attached before, got \['b'\]"):
        lp.attach(model, lp.XLoRA(adapters=["b"]), adapter_name="c")
    with pytest.raises(ValueError, match="one pass, got XLoRA"):
        _check_adapters(model)
    with lp.adapter_names(["router", "router"]), pytest.raises(RuntimeError, match="router alone"):
        model(**inputs)
    lp.attach(model, lp.HRA(r=2, target_modules=["q_proj"]), adapter_name="hra")
    with pytest.raises(ValueError, match=r"expected low-rank changes .* got HRA"):
        lp.attach(model, lp.XLoRA(adapters=["hra"]), adapter_name="c")
    for fields in ({"adapters": []}, {"adapters": ["a"], "top_k": 0}, {"adapters": ["a", "a"]}):
        with pytest.raises(ValueError, match="expected"):
            lp.XLoRA(**fields)  # type: ignore[arg-type]


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    base, inputs = build("llama")
    paths = experts(base, ["q_proj"], tmp_path)
    model = routed(base, paths)
    want = run(model, inputs)
    lp.save_adapter(model, tmp_path / "all", adapter_name="router")
    folder, fresh = tmp_path / "all" / "router", copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"attached as \['0', '1', '2'\].*load each of"):
        lp.load_adapter(fresh, folder)
    for n in NAMES:
        lp.load_adapter(fresh, tmp_path / "all" / n, adapter_name=n)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    head = "base_model.internal_xlora_classifier.layers.0."
    assert set(tensors) == {f"{head}weight", f"{head}bias"}
    for changed, match in [
        ({f"{head}weight": tensors[f"{head}weight"]}, r"missing layers\.0\.bias"),
        ({**tensors, f"{head}bias": torch.zeros(4)}, r"expected shape \[3\], got \[4\]"),
        ({**tensors, "base_model.internal_xlora_classifier.x": torch.zeros(1)}, "no such tensor"),
    ]:
        save_file(changed, file)
        with pytest.raises(ValueError, match=match):
            lp.load_adapter(fresh, folder, adapter_name="router")
    there = copy.deepcopy(base)
    there.config.use_cache = False  # type: ignore[union-attr]
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths)
    peft.get_peft_model(there, config).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="no tensor of its classifier"):
        lp.load_adapter(fresh, tmp_path / "theirs", adapter_name="router")
    save_file(tensors, file)
    lp.load_adapter(fresh, folder, adapter_name="router")
    assert torch.equal(run(fresh.eval(), inputs), want)

    other = copy.deepcopy(base)
    lp.attach(other, lp.VeRA(r=4, target_modules=["q_proj"]), adapter_name="v")
    lp.attach(other, lp.XLoRA(adapters=["v"]), adapter_name="router")
    with pytest.raises(ValueError, match=r"expected LoRA adapters.*got VeRA as 'v'"):
        lp.save_adapter(other, tmp_path / "none", adapter_name="router")
    assert not (tmp_path / "none").exists()
