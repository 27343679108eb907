"""Arrow: routed as peft routes, with the true direction of each adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch import nn

import lightning_peft as lp
from lightning_peft.layers.adapted import adapted_modules, weight_adapters_of
from tests.helpers.compare import assert_close
from tests.helpers.peft_exchange import build, randomise, run

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "bart": ["q_proj", "fc2"],
    "modernbert": ["Wqkv", "Wo"],
}
NAMES = ["task_0", "task_1", "task_2", "gks_0", "gks_1"]


def saved(base: nn.Module, folder: Path, targets: list[str], r: int = 4) -> list[str]:
    for i in range(5):
        model = copy.deepcopy(base)
        lp.attach(model, lp.LoRA(r=r, alpha=6.0, target_modules=targets))
        randomise(model, seed=i, std=0.3)
        lp.save_adapter(model, folder / str(i))
    return [str(folder / str(i)) for i in range(5)]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("general", [False, True])
def test_outputs_are_pefts(name: str, general: bool, tmp_path: Path) -> None:
    """With the true singular vectors in peft too: its own come from 15 power steps."""
    targets = TARGETS[name]
    base, inputs = build(name)
    paths = saved(base, tmp_path, targets)
    ours: Any = copy.deepcopy(base)
    for n, path in zip(NAMES, paths, strict=True):
        lp.load_adapter(ours, path, adapter_name=n)
    gks = NAMES[3:] if general else []
    lp.route(ours, NAMES[:3], "arrow", top_k=2, temperature=0.7, general=gks)
    lp.set_adapter(ours, "arrow")
    config = ArrowConfig(top_k=2, router_temperature=0.7, use_gks=general, rng_seed=1)
    theirs: Any = create_arrow_model(
        copy.deepcopy(base), paths[:3], config, general_adapter_paths=paths[3:] if general else None
    ).eval()
    run(theirs, inputs)  # makes the prototypes
    there = dict(theirs.base_model.model.named_modules())
    for path, module in adapted_modules(ours):
        (adapter,) = weight_adapters_of(module, "arrow")
        layer = there[path].lora_arrow["arrow_router"]
        v = adapter.tensors()["v"]
        assert (layer.prototypes * v).sum(1).abs().mean() > 0.3
        layer.prototypes = v.clone()
    want = run(theirs, inputs)
    assert (want - run(base, inputs)).norm() > 1e-2 * want.norm()
    assert_close("output", run(ours, inputs), want, floor=1e-5)


def net() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    for i, (r, targets) in enumerate([(2, ["0", "2"]), (3, ["0"]), (1, ["2"])]):
        lp.attach(model, lp.LoRA(r=r, target_modules=targets), adapter_name=f"a{i}")
        randomise(model, seed=i)
    return model.eval()


def test_other_ranks_and_layers_and_resume() -> None:
    model, x = net(), torch.randn(4, 7, 8)
    lp.set_adapter(model, "a0")
    alone = model(x)
    report = lp.route(model, ["a0", "a1", "a2"], "mix", top_k=1)
    assert report.trainable == 0
    assert torch.equal(model(x), alone)
    lp.set_adapter(model, "mix")
    want = model(x)
    layer = model[0]
    first = layer.peft["mix"].tensors()
    assert first["owner"].tolist() == [0, 0, 1, 1, 1]
    for i, A in enumerate((layer.peft["a0"].A, layer.peft["a1"].A)):
        B = (layer.peft["a0"].B, layer.peft["a1"].B)[i]
        direction = torch.linalg.svd(B @ A)[2][0]
        assert abs(float(direction @ first["v"][i])) > 1 - 1e-5
    fit = (x @ first["v"].mT).abs().argmax(-1)
    own = [nn.functional.linear(x, layer.peft[f"a{i}"].edit().terms[0].matrix()) for i in (0, 1)]
    by_hand = nn.functional.linear(x, layer.peft["a0"].site.weight(), layer.bias) + torch.where(
        (fit == 0)[..., None], own[0], own[1]
    )
    torch.testing.assert_close(layer(x), by_hand)
    state = lp.adapter_state_dict(model, "mix")
    again = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).eval()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "peft" not in k})
    (method,) = vars(model)["_peft_registry"].adapters["mix"].methods
    lp.attach(again, method, adapter_name="mix")
    lp.load_adapter_state_dict(again, state)
    torch.testing.assert_close(again(x), want)


@pytest.mark.parametrize("general", [False, True])
def test_a_directory_of_pefts_router_is_read(general: bool, tmp_path: Path) -> None:
    base, inputs = build("llama")
    paths = saved(base, tmp_path / "experts", TARGETS["llama"])
    config = ArrowConfig(top_k=2, router_temperature=0.7, use_gks=general, rng_seed=1)
    theirs: Any = create_arrow_model(
        copy.deepcopy(base), paths[:3], config, general_adapter_paths=paths[3:] if general else None
    )
    theirs.save_pretrained(str(tmp_path), selected_adapters=["arrow_router"])
    folder = tmp_path / "arrow_router"
    names = NAMES if general else NAMES[:3]
    model: Any = copy.deepcopy(base)
    with pytest.raises(ValueError, match="expected adapters attached as"):
        lp.load_adapter(model, folder, adapter_name="mix")
    for name, path in zip(names, paths, strict=False):
        lp.load_adapter(model, path, adapter_name=name)
    report = lp.load_adapter(model, folder, adapter_name="mix")
    assert any("estimates by power" in note for note in report.notes)
    other: Any = copy.deepcopy(base)
    for name, path in zip(names, paths, strict=False):
        lp.load_adapter(other, path, adapter_name=name)
    lp.route(other, NAMES[:3], "mix", top_k=2, temperature=0.7, general=names[3:])
    lp.set_adapter(other, "mix")
    assert torch.equal(run(model, inputs), run(other, inputs))
    file = folder / "adapter_config.json"
    wrong = json.loads(file.read_text())
    wrong["arrow_config"]["top_k"] = "2"
    file.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="expected task_adapter_names"):
        lp.load_adapter(model, folder, adapter_name="more")
    with pytest.raises(ValueError, match="quantised when you load the first"):
        lp.load_adapter(model, folder, adapter_name="more", quantization="nf4")


def test_refused(tmp_path: Path) -> None:
    model = net()
    with pytest.raises(KeyError, match="route: expected adapters among"):
        lp.route(model, ["a0", "b"], "mix")
    with pytest.raises(ValueError, match="at least one adapter"):
        lp.route(model, [], "mix")
    with pytest.raises(ValueError, match="rank of the general adapters, 3, got 2"):
        lp.route(model, ["a0"], "mix", general=["a1"])
    with pytest.raises(ValueError, match="top_k >= 1"):
        lp.route(model, ["a0"], "mix", top_k=0)
    lp.route(model, ["a0", "a1"], "mix")
    lp.set_adapter(model, "mix")
    with pytest.raises(RuntimeError, match="depends on the input"):
        lp.merge(model)
    with pytest.raises(ValueError, match="a method that peft has too, got Arrow"):
        lp.save_adapter(model, tmp_path, adapter_name="mix")
