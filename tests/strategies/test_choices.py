"""What the strategies choose and refuse, without a second process."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, AdaLoRA, LoRA, attach, register_strategies
from lightning_peft.checkpoint.shard_folder import prune, read_folder
from lightning_peft.optim import AdamW8bit, join_shards, moments, shard
from lightning_peft.strategies.ddp import may_skip, reentrant
from lightning_peft.strategies.shard_units import check_ties, root_units, shard_units
from tests.helpers.lightning_package import current, fabric, pl
from tests.helpers.nets import Plain, loader, peft, trainer
from tests.helpers.tiny_models import BUILDERS

both = pytest.mark.usefixtures("lightning_package")


def strategies() -> Any:
    """The module with the strategies of the current package."""
    return importlib.import_module(f"lightning_peft.strategies.{current().partition('.')[0]}")


@both
def test_registered_by_name() -> None:
    register_strategies()
    for name, cls in (
        ("peft_ddp", strategies().PEFTDDPStrategy),
        ("peft_fsdp", strategies().PEFTFSDPStrategy),
    ):
        assert type(pl.strategies.StrategyRegistry.get(name)) is cls
        made = pl.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False)
        assert type(made.strategy) is cls


@both
def test_registered_with_fabric() -> None:
    register_strategies()
    for name in ("peft_ddp", "peft_fsdp"):
        made = fabric().Fabric(accelerator="cpu", devices=2, strategy=name)
        assert made._strategy.strategy_name == name
        assert isinstance(made._strategy, fabric().strategies.ParallelStrategy)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
    ],
)
def test_units_of_known_models(name: str, units: list[str]) -> None:
    found = [n for n, _ in shard_units(BUILDERS[name]())]
    assert set(units) <= set(found)


def test_units_of_a_plain_net() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    net = nn.ModuleDict(
        {
            "small": nn.ModuleList([nn.Linear(2, 2) for _ in range(4)]),
            "blocks": nn.ModuleList([block() for _ in range(3)]),
        }
    )
    assert [n for n, _ in shard_units(net)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(shard_units(net, [nn.Linear])) == 10
    assert shard_units(nn.Linear(2, 2)) == []
    with pytest.raises(ValueError, match="expected classes of this model, got \\['Nothing'\\]"):
        shard_units(net, ["Nothing"])


@pytest.mark.parametrize(
    ("name", "tied", "ends"),
    [
        ("llama", False, [["model.embed_tokens"], ["lm_head"]]),
        ("llama", True, [["model.embed_tokens", "lm_head"]]),
        ("gpt2", True, [["transformer.wte", "lm_head"]]),
        ("bert", False, []),  # inside a unit: BertEmbeddings does not split
    ],
)
def test_ends_are_units_that_respect_ties(name: str, tied: bool, ends: list[list[str]]) -> None:
    model: Any = BUILDERS[name]()
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    found = root_units(model, shard_units(model))
    assert [[n for n, _ in unit] for unit in found] == ends


def test_an_end_that_is_tied_to_another_module_stays_in_the_root() -> None:
    model: Any = BUILDERS["llama"]()
    model.extra = nn.Linear(32, model.config.vocab_size, bias=False)
    model.extra.weight = model.lm_head.weight
    found = root_units(model, shard_units(model))
    assert [[n for n, _ in unit] for unit in found] == [["model.embed_tokens"]]
    check_ties(model, [[unit] for unit in shard_units(model)], ())


def test_classes_that_split_a_tied_pair_are_refused() -> None:
    model: Any = BUILDERS["gpt2"]()
    model.lm_head.weight = model.transformer.wte.weight
    units = [[unit] for unit in shard_units(model, ["Embedding", nn.Linear])]
    with pytest.raises(ValueError, match=r"got transformer\.wte\.weight = lm_head\.weight in the"):
        check_ties(model, units, ["Embedding", nn.Linear])
    with pytest.raises(
        ValueError, match=r"leave their classes out of shard_classes=\['Embedding', "
    ):
        check_ties(model, units, ["Embedding", nn.Linear])


@pytest.mark.parametrize(("name", "beside"), [("experts", "x"), ("branches", "router")])
def test_experts_are_no_units(name: str, beside: str) -> None:
    """A rank that no sample sends to an expert would not take part in gathering it."""

    def block() -> nn.Module:
        parts = {name: nn.ModuleList(nn.Linear(32, 32) for _ in range(8)), beside: nn.Linear(32, 8)}
        return nn.ModuleDict(parts)

    one = nn.ModuleDict({"block": block(), "ends": nn.ModuleList(nn.Linear(2, 2) for _ in "ab")})
    assert [n for n, _ in shard_units(one)] == ["ends.0", "ends.1"]
    deep = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(2))})
    assert [n for n, _ in shard_units(deep)] == ["layers.0", "layers.1"]


def test_adapters_that_a_batch_may_leave_out() -> None:
    model = BUILDERS["llama"]()
    attach(model, LoRA(r=2))
    assert may_skip(model) == ""
    attach(model, LoRA(r=2), adapter_name="other")
    assert may_skip(model) == "adapters ['default', 'other']"
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])})
    attach(experts, LoRA(r=2, target_modules="all-linear"))
    assert may_skip(experts) == "experts"


def test_reentrant_checkpointing_is_seen() -> None:
    model = BUILDERS["llama"]()
    assert reentrant(model) == ""
    for value in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": value})  # type: ignore[operator]
        assert bool(reentrant(model)) is value


@both
def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match="expected tensor_parallel_size=1, got 2"):
        strategies().PEFTFSDPStrategy(tensor_parallel_size=2)


@both
def test_a_schedule_over_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.rank_forks import free_port

    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    method = AdaLoRA(init_r=2, target_r=1, target_modules="all-linear")
    run = trainer(PEFT(method, report=False), max_epochs=1, strategy="peft_fsdp", devices=1)
    try:
        with pytest.raises(ValueError, match="expected a method without a schedule, got AdaLoRA"):
            run.fit(Plain(), loader())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@both
@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("PEFTDDPStrategy", {}, None, ""),
        ("PEFTFSDPStrategy", {}, None, ""),
        ("PEFTFSDPStrategy", {"data_parallel_size": 2}, ValueError, "'auto' or 1"),
        ("PEFTFSDPStrategy", {"shard_classes": ["No"]}, ValueError, "got \\['No'\\]"),
    ],
)
def test_one_process_works_too(
    name: str,
    options: dict[str, Any],
    error: type[Exception] | None,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.helpers.rank_forks import free_port

    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    model = Plain()
    strategy = getattr(strategies(), name)(**options)
    run = trainer(peft(), max_epochs=1, strategy=strategy, devices=1)
    try:
        if error is None:
            run.fit(model, loader())
            run.validate(model, loader(), verbose=False)
        else:
            with pytest.raises(error, match=text):
                run.fit(model, loader())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", ["auto", "peft_ddp", "peft_fsdp"])
@both
def test_bases_on_meta_and_folders_go_together(strategy: str, tmp_path: Path) -> None:
    """Without the other, each is refused before anything changes."""
    with torch.device("meta"):
        empty = Plain()
    try:
        with pytest.raises(RuntimeError, match=r"got 6 tensors of Plain on the meta device \(net"):
            trainer(peft(), strategy=strategy, devices=1).fit(empty)
        with pytest.raises(ValueError, match=r"PEFT base_from: expected a base on the meta device"):
            trainer(peft(base_from=tmp_path), strategy=strategy, devices=1).fit(Plain())
        with pytest.raises(FileNotFoundError, match=r"expected \*.safetensors, found none"):
            trainer(peft(base_from=tmp_path), strategy=strategy, devices=1).fit(empty)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_pieces_of_an_interrupted_save_are_not_published(tmp_path: Path) -> None:
    for name in ("piece-0.pt", "piece-1.pt", "piece-2.pt", ".piece-1.pt.tmp-host-1", "meta.pt"):
        (tmp_path / name).write_text("x")
    prune(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"piece-0.pt", "piece-1.pt", "meta.pt"}
    (tmp_path / "meta.pt").unlink()
    with pytest.raises(ValueError, match="never finished"):
        read_folder(tmp_path)


def test_shards_of_any_size_come_back_byte_for_byte() -> None:
    p = nn.Parameter(torch.randn(1000))
    optimizer = AdamW8bit([p], lr=1e-2)
    p.grad = torch.randn(1000)
    optimizer.step()
    whole = optimizer.state_dict()["state"][0]
    for cut in (512, 300):
        parts = [shard(whole, 0, cut), shard(whole, cut, 1000 - cut)]
        joined = join_shards(parts, exact=True)
        for part, (first, n) in zip(parts, ((0, cut), (cut, 1000 - cut)), strict=True):
            again = shard(joined, first, n)
            assert all(torch.equal(part[k], again[k]) for k in part)
        for joint, one in zip(moments(joined), moments(whole), strict=True):
            assert (joint - one).abs().max() <= 0.02 * one.abs().max()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: joined}})


@both
def test_bytes_are_adapters_and_state(tmp_path: Path) -> None:
    """1 M adapter elements: fp32 weights, and two fp32 moments each."""

    class Wide(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 3))

    model = Wide()
    run = trainer(peft(quantization="nf4", modules_to_save=[]), max_steps=1, limit_val_batches=0)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    size = (tmp_path / "a.ckpt").stat().st_size
    assert trained * 3 <= size <= trained * 3 + 60_000
