"""Two storages from outside the package, through everything that reads or quantises a weight."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lightning_peft as lp
from lightning_peft import PEFT, BitFit, Full, LastLayers, LoRA, Quantization
from lightning_peft.checkpoint import atomic_file
from lightning_peft.checkpoint.contents import KEY
from lightning_peft.methods.base import Method
from lightning_peft.storage import (
    StorageConfig,
    config_from_dict,
    config_to_dict,
    held_tensors,
    storage_for,
    storage_of,
)
from lightning_peft.strategies.sharding import Options, shard_model
from tests import test_invariants
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.layer_cases import Layer
from tests.helpers.lightning_package import in_package
from tests.helpers.method_cases import CASES, Case
from tests.helpers.nets import Plain, adapters_of, assert_same, loader, trainer
from tests.helpers.routed_experts import DenseExperts
from tests.helpers.stored import stored_tensors
from tests.helpers.toy_foreign_storage import ForeignExperts, ForeignLinear, unpacked
from tests.helpers.toy_int8_storage import ToyInt8
from tests.storage import shard_job

INT8 = Layer("toy_int8", lambda: nn.Linear(16, 12), lambda: torch.randn(3, 5, 16), ToyInt8())
FOREIGN = Layer("toy_foreign", lambda: ForeignLinear(16, 12), lambda: torch.randn(3, 5, 16))
LABELS = {"int8": "toy int8", "foreign": "toy foreign"}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert_same_bits(key, got[key], value)


def config(kind: str) -> StorageConfig | None:
    return ToyInt8() if kind == "int8" else None


@pytest.mark.parametrize("layer", [INT8, FOREIGN], ids=lambda y: y.name)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_method(case: Case, layer: Layer) -> None:
    """The promises of `test_invariants`: start, gradients, state dict, merge, copies, detach."""
    if layer is FOREIGN and case.name in ("pissa", "olora"):
        pytest.skip("the residual is rounded to the format: the start is not equal")
    test_invariants.test_adapter(case, layer)


ON_EXPERTS = ("lora", "dora", "ia3", "vera", "loha", "lokr", "miss", "diff_pruning")


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ON_EXPERTS], ids=lambda c: c.name)
def test_experts(case: Case, kind: str) -> None:
    """Against the function of the dequantised weights; merged both ways; detached."""
    model: Any = nn.Sequential(ForeignExperts() if kind == "foreign" else DenseExperts())
    before, cls = bits(model), type(model[0])
    x, weights = torch.randn(7, 8), torch.rand(7, 2)
    index = torch.randint(0, 3, (7, 2))

    def reference() -> Tensor:
        up, down = (
            storage_of(model[0], n).read(model[0], n) for n in ("gate_up_proj", "down_proj")
        )
        y: Tensor = model[0].reference(up, down, x, index, weights)
        return y.detach()

    method: Any = dataclasses.replace(case.method, target_modules=["0"])  # type: ignore[type-var]
    lp.attach(model, method, quantization=config(kind))
    assert {g.storage for g in lp.parameter_report(model).groups} == {LABELS[kind]}
    with lp.disable_adapters(model):
        assert_close("output of the base", model[0](x, index, weights).detach(), reference())
    test_invariants.move(model)
    held = bits(model)
    z = x.clone().requires_grad_()
    y = model[0](z, index, weights)
    y.square().sum().backward()
    assert z.grad is not None
    assert z.grad.any()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    y = y.detach()

    lp.merge(model)
    assert_close("function of the merged weights", reference(), y)
    assert_close("output after merge", model[0](x, index, weights).detach(), y)
    lp.unmerge(model)
    lp.merge(model, into="storage")
    assert storage_of(model[0], "down_proj").label == LABELS[kind]
    assert_close("merged in place", model[0](x, index, weights).detach(), y, floor=0.1)
    lp.unmerge(model)
    assert_bits(bits(model), held)
    lp.detach(model)
    if kind == "foreign":
        assert type(model[0]) is cls
        assert_bits(bits(model), before)


# ---- layers that arrive quantised


def foreign_net() -> nn.Sequential:
    """Foreign layers on both sides of a dense one; the same values in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(
            ForeignLinear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), ForeignLinear(16, 3)
        )


def test_adoption_reaches_layers_without_adapters() -> None:
    """The foreign forward cuts the gradient: only an adopted last layer lets it through."""
    model = foreign_net()
    lp.attach(model, LoRA(r=2, target_modules=["0"]))
    test_invariants.move(model)
    model(torch.randn(4, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(t.tensor.dtype == torch.uint8 for t in _tensors(model[4]))


def _tensors(module: nn.Module) -> list[Any]:
    return list(storage_of(module).iter_tensors(module, "weight"))


@pytest.mark.parametrize("refused", ["nothing matches", "selected", "quantize"])
def test_a_refusal_gives_layers_back(refused: str, tmp_path: Path) -> None:
    model = foreign_net()
    before, classes = bits(model), [type(m) for m in model]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    identities = {n: id(p) for n, p in model.named_parameters()}
    if refused == "nothing matches":
        with pytest.raises(ValueError, match="nowhere"):
            lp.attach(model, LoRA(target_modules=["nowhere"]))
    elif refused == "selected":
        with pytest.raises(ValueError, match=r"'0.weight'.*toy foreign"):
            lp.attach(model, Full())
    else:
        model[2].weight.data[0, 0] = float("nan")
        before = bits(model)
        with pytest.raises(ValueError, match="expected finite weights"):
            lp.quantize(model, ToyInt8())
    assert [type(m) for m in model] == classes
    got = bits(model)
    assert all(torch.equal(got[k], v) or v.isnan().any() for k, v in before.items())
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in before.items()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: id(p) for n, p in model.named_parameters()} == identities


def test_a_layer_that_cannot_be_adopted_is_named() -> None:
    model = foreign_net()
    model[4].weight_scale_inv = nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match="expected int8 codes with a scale per row"):
        lp.attach(model, LoRA(target_modules=["2"]))
    assert type(model[0]) is ForeignLinear
    assert model[0].weight.dtype == torch.int8


def test_quantize_then_detach() -> None:
    """`quantize` leaves foreign layers in their format; `detach` gives them back."""
    model = foreign_net()
    lp.quantize(model, ToyInt8())
    labels = [storage_of(m).label for m in (model[0], model[2], model[4])]
    assert labels == ["toy foreign", "toy int8", "toy foreign"]
    lp.detach(model)
    assert type(model[0]) is ForeignLinear
    assert storage_of(model[2]).label == "toy int8"


def test_export_under_its_own_names() -> None:
    """The exported tensors load into the other library's class, which then has the merged layer."""
    model, x = foreign_net(), torch.randn(4, 8)
    lp.attach(model, LoRA(r=2, target_modules=["0"]))
    test_invariants.move(model)
    lp.merge(model, into="storage")
    exported = storage_of(model[0]).export(model[0])
    fresh = ForeignLinear(8, 16)
    assert {k: v.dtype for k, v in exported.items()} == {
        k: v.dtype for k, v in fresh.state_dict().items()
    }
    fresh.load_state_dict(exported)
    assert_close("the other library's own forward", fresh(x), model[0](x).detach())


# ---- methods that train the model's own parameters


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("method", [Full(), LastLayers(n=1)], ids=lambda m: m.label)
def test_selected_weights_are_refused(method: Method, kind: str) -> None:
    blocks = nn.ModuleList([nn.Sequential(foreign_net()) for _ in range(2)])
    model = nn.ModuleDict({"blocks": blocks})
    if kind == "int8":
        lp.quantize(model, ToyInt8())
    with pytest.raises(ValueError, match=f"expected a dense weight .* got toy {kind}|got toy"):
        lp.attach(model, method)


@pytest.mark.parametrize("kind", LABELS)
def test_experts_are_refused_too(kind: str) -> None:
    model = nn.Sequential(ForeignExperts() if kind == "foreign" else DenseExperts())
    if kind == "int8":
        lp.quantize(model, ToyInt8())
    with pytest.raises(ValueError, match=f"_proj'.*got {LABELS[kind]}"):
        lp.attach(model, Full())
    with pytest.raises(ValueError, match=f"_proj'.*got {LABELS[kind]}"):
        lp.attach(nn.ModuleDict({"body": model}), LoRA(target_modules=["0"]), modules_to_save=["0"])


@pytest.mark.parametrize("kind", LABELS)
def test_bitfit_trains_biases_alone(kind: str) -> None:
    model = foreign_net()
    lp.attach(model, BitFit(), quantization=config(kind))
    model(torch.randn(4, 8)).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{i}.peft.default.bias" for i in (0, 2, 4)}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


# ---- report and planner


@pytest.mark.parametrize("kind", LABELS)
def test_report_and_plan(kind: str) -> None:
    """Bytes by hand; the planner counts what `attach` makes."""
    layer = ForeignLinear(32, 64) if kind == "foreign" else nn.Linear(32, 64)
    model = nn.Sequential(layer, nn.Linear(64, 2))
    method = LoRA(r=2, target_modules=["0"])
    quantization = None if kind == "foreign" else ToyInt8(exclude_modules=["1"])
    plan = lp.estimate_memory(model, method, quantization=quantization, precision="32-true")
    report = lp.attach(model, method, quantization=quantization)
    assert report.groups[0].storage == LABELS[kind]
    assert report.nbytes["quantised base"] == 64 * 32 + 4 * 64
    adapters, dense = 2 * (32 + 64), 64 + 64 * 2 + 2
    assert report.total == 64 * 32 + dense + adapters
    assert plan.sizes.base[LABELS[kind]] == (64 * 32, 64 * 32 + 4 * 64)
    assert plan.sizes.total == report.total
    assert plan.sizes.dequantised == 64 * 32
    assert kind == "foreign" or "on toy int8" in plan.choice.label
    nbytes = storage_of(model[0]).nbytes(model[0], "weight")
    if quantization is not None:
        shape = torch.Size((64, 32))
        assert storage_for(quantization).bits_per_weight(shape, quantization) * 64 * 4 == nbytes


# ---- files


class ForeignNet(Plain):
    """Arrives quantised, in its first and last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = foreign_net()


def run_of(kind: str) -> tuple[Plain, PEFT]:
    torch.manual_seed(1)
    module = ForeignNet() if kind == "foreign" else Plain()
    method = LoRA(r=2, target_modules="all-linear")
    return module, PEFT(method, quantization=config(kind), report=False)


@pytest.mark.parametrize("kind", LABELS)
def test_resume_is_the_straight_run(kind: str, tmp_path: Path) -> None:
    """Checkpoint of adapters alone, resume, `load_from_checkpoint`; another base is refused."""
    straight, callback = run_of(kind)
    trainer(callback, max_epochs=2).fit(straight)
    first, callback = run_of(kind)
    trainer(callback, folder=tmp_path, max_epochs=1).fit(first)
    path = tmp_path / "last.ckpt"
    stored = atomic_file.read(path)
    assert all(".peft." in key for key in stored_tensors(stored))
    root = next(iter(stored[KEY]["roots"].values()))
    want = {"storage": "ToyInt8", "exclude_modules": None} if kind == "int8" else None
    assert root["quantization"] == want
    resumed, callback = run_of(kind)
    trainer(callback, max_epochs=2).fit(resumed, ckpt_path=path)
    assert_same(adapters_of(resumed), adapters_of(straight))

    x = next(iter(loader()))[0]
    loaded = lp.load_from_checkpoint(type(first), path)
    assert_same_bits("output", loaded.eval()(x).detach(), first.eval()(x).detach())
    other, callback = run_of(kind)
    if kind == "foreign":
        other.net[0].weight_scale_inv.data[0] *= 2
    else:
        other.net[0].weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="expected the base it was trained on"):
        trainer(callback, max_epochs=2).fit(other, ckpt_path=path)


@pytest.mark.parametrize("kind", LABELS)
def test_adapter_directory(kind: str, tmp_path: Path) -> None:
    model = foreign_net()
    twin = copy.deepcopy(model)
    lp.attach(model, LoRA(r=2, target_modules=["0", "2"]), quantization=config(kind))
    test_invariants.move(model)
    lp.save_adapter(model, tmp_path)
    report = lp.load_adapter(twin, tmp_path, quantization=config(kind))
    assert report.nbytes["quantised base"] > 0
    x = torch.randn(4, 8)
    assert_same_bits("output", twin(x).detach(), model(x).detach())
    lp.detach(twin)
    assert type(twin[0]) is ForeignLinear
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match="adapter_model"):
        lp.load_adapter(twin, tmp_path)
    assert type(twin[0]) is ForeignLinear


def test_configurations_as_plain_data() -> None:
    """A `Quantization` keeps the form that earlier checkpoints hold."""
    given = [Quantization("fp4", block_size=128), ToyInt8(exclude_modules=["head"]), None]
    assert [config_from_dict(config_to_dict(c)) for c in given] == given
    old = {"kind": "nf4", "block_size": 64, "double_quant": True, "compute_dtype": None}
    assert config_from_dict(old) == Quantization("nf4")
    assert config_to_dict(Quantization("nf4")) == dataclasses.asdict(Quantization("nf4"))
    with pytest.raises(ValueError, match=r"expected one of .*ToyInt8.*got 'Absent'; import"):
        config_from_dict({"storage": "Absent"})
    with pytest.raises(ValueError, match=r"got also \['later'\]"):
        config_from_dict({"storage": "ToyInt8", "later": 1})


def test_an_unregistered_configuration_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Unknown(StorageConfig):
        pass

    model = foreign_net()
    with pytest.raises(TypeError, match=r"expected one of .*'ToyInt8'.* got .*Unknown"):
        lp.attach(model, LoRA(target_modules=["2"]), quantization=Unknown())
    assert type(model[0]) is ForeignLinear


def test_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        """
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, max_epochs: 1,
  enable_model_summary: false, enable_checkpointing: false,
  callbacks: [{class_path: lightning_peft.PEFT, init_args: {report: false,
    method: {class_path: lightning_peft.LoRA, init_args: {r: 2, target_modules: all-linear}},
    quantization: {class_path: tests.helpers.toy_int8_storage.ToyInt8,
      init_args: {exclude_modules: ["0"]}}}}]}
"""
    )
    cli = LightningCLI(
        in_package(Plain), args=["fit", "--config", str(path)], save_config_callback=None
    )
    assert [storage_of(cli.model.net[i]).label for i in (0, 3)] == ["dense", "toy int8"]


# ---- FSDP


def test_sharded_or_refused() -> None:
    """One process's shards of int8 train as the plain model does; the foreign format is refused."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard_job.compare_sharded(init_device_mesh("cpu", (1,)))
        foreign = Plain()
        foreign.net = foreign_net()
        lp.attach(foreign, LoRA(r=2, target_modules=["net.2"]))
        with pytest.raises(ValueError, match=r"'net.0' in toy foreign: its kernel"):
            shard_model(foreign, init_device_mesh("cpu", (1,)), torch.device("cpu"), Options())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_half_of_the_rows() -> None:
    job = Path(shard_job.__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(job)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_bitsandbytes_names_its_companions() -> None:
    """Held tensors of a layer whose scales are outside of its parameters."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    assert list(held_tensors(layer)) == ["weight"]
    roles = [t.role for t in _tensors(layer)]
    assert roles == ["codes", "absmax", "absmax2", "offset"]
    assert unpacked(torch.tensor([[4]]), torch.tensor([2.0])).item() == 2.0
