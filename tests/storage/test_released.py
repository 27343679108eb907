"""Every released format through everything that reads, trains, merges or writes a weight.

The oracle is the same checkpoint, dequantised by the tests' own code, in the model's dense class.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightning_peft as lp
from lightning_peft import PEFT, BitFit, Full, LastLayers, LoRA, Quantization, load_packed
from lightning_peft.checkpoint import atomic_file
from lightning_peft.storage import held_tensors, storage_of
from lightning_peft.strategies.sharding import Options, shard_model
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.released import RELEASED, save_state, write
from tests.helpers.stored import stored_tensors

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
QUICK = ("fp8", "fp8 experts", "mxfp4", "int4 experts", "nvfp4")


def formats(*more: str) -> pytest.MarkDecorator:
    """Every format; slow ones but for the quick ones and `more`."""
    quick = (*QUICK, *more)
    return pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in RELEASED],
    )


FORMATS = formats()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(packed, dense) directory of each format."""
    return {name: write(name, tmp_path_factory.mktemp(name.replace(" ", "_"))) for name in RELEASED}


Folders = dict[str, tuple[Path, Path]]


def packed(folders: Folders, name: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_packed(AutoModelForCausalLM, folders[name][0], dtype=dtype).train()


def dense(folders: Folders, name: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folders[name][1], dtype=dtype).train()


def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS).logits.detach()
    return out


def move(model: nn.Module) -> None:
    """Give adapters values; the same for models with the same adapters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.03)


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def attached(model: Any, method: Any) -> Any:
    torch.manual_seed(0)
    lp.attach(model, method)
    move(model)
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    held = ((n, m, h) for n, m in model.named_modules() for h in held_tensors(m).items())
    return {
        f"{n}.{k}": {**m._parameters, **m._buffers}[k].detach().clone() for n, m, (k, _) in held
    }


def assert_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for key, value in want.items():
        assert_same_bits(key, got[key], value)


@formats("torchao int8", "gptq desc_act", "awq experts")
def test_trains_as_the_dequantised_model(name: str, folders: Folders) -> None:
    model, oracle = packed(folders, name), dense(folders, name)
    # A global scale is inverted before it multiplies, and desc_act adds products in another order:
    # neither sum is nearer to fp64 than the other.
    other_sum = name in ("nvfp4", "gptq desc_act")
    assert_close("output of the base", logits(model), logits(oracle), floor=1e-6)
    assert {p.dtype for n, p in model.named_parameters() if n in bits(model)} == {torch.uint8}
    before = bits(model)
    method = LoRA(r=4, target_modules="all-linear")
    for m in (model, oracle):
        attached(m, method)
    labels = {g.storage for g in lp.parameter_report(model).groups}
    assert RELEASED[name].label in labels
    assert_close("output", logits(model), logits(oracle), floor=1e-6)
    got, want = gradients(model), gradients(oracle)
    assert set(got) == set(want)
    exact = gradients(attached(dense(folders, name, torch.float64), method)) if other_sum else {}
    for key, value in want.items():
        assert value.any(), key
        if other_sum:
            rules = {"want": exact[key], "same_dtype": value, "floor": 0.0}
        else:
            rules = {"want": value, "floor": 1e-6}
        assert_close(f"gradient of {key}", got[key], **rules)
    assert_bits(bits(model), before)


@FORMATS
def test_no_dense_copy_is_kept(name: str, folders: Folders) -> None:
    model = attached(packed(folders, name), LoRA(r=4, target_modules="all-linear"))
    held = [(m, h) for m in model.modules() for h in held_tensors(m).values()]
    sizes = {h.storage.numel(m, h.weight) for m, h in held}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.numel() in sizes:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(IDS, labels=IDS).loss.backward()
    assert [t.shape for t in kept if t.untyped_storage().data_ptr() not in own] == []


METHODS = [
    lp.DoRA(r=2), lp.VeRA(r=4), lp.IA3(), lp.LoHa(r=2), lp.LoKr(r=2), lp.MiSS(r=2), BitFit(),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
@pytest.mark.parametrize("name", ["fp8", "fp8 experts", "mxfp4"])
def test_methods(name: str, method: Any, folders: Folders) -> None:
    if isinstance(method, BitFit) and name == "fp8 experts":
        pytest.skip("Qwen3-MoE has no biases")
    models = [attached(make(folders, name), method) for make in (packed, dense)]
    got, want = (gradients(m) for m in models)
    assert set(got) == set(want)
    for key, value in want.items():
        assert_close(f"gradient of {key}", got[key], value, floor=1e-5)
    before = logits(models[0])
    lp.merge(models[0])
    assert_close("output after merge", logits(models[0]), before)


@FORMATS
def test_half_precision(name: str, folders: Folders) -> None:
    """bf16: the same base output, and gradients as near to fp32 as those of the dense model."""
    model, oracle = (make(folders, name, torch.bfloat16) for make in (packed, dense))
    assert_close("output of the base", logits(model), logits(oracle))
    exact = dense(folders, name)
    for m in (model, oracle, exact):
        attached(m, LoRA(r=4, target_modules="all-linear"))
    got, theirs, want = gradients(model), gradients(oracle), gradients(exact)
    for key, value in want.items():
        scale = value.norm()
        error, bound = ((g[key].float() - value).norm() / scale for g in (got, theirs))
        assert error <= 2 * bound + 2e-2, f"{key}: {error:.3f}, dense bf16 {bound:.3f}"


# ---- files


@FORMATS
def test_saved_unchanged(name: str, folders: Folders, tmp_path: Path) -> None:
    """`save_pretrained` writes the released tensors, bit for bit."""
    model = packed(folders, name)
    model.save_pretrained(tmp_path / "again")
    got, want = (load_file(f / "model.safetensors") for f in (tmp_path / "again", folders[name][0]))
    assert set(got) == set(want)
    for key, value in want.items():
        wide = value.to(got[key].dtype) if value.is_floating_point() else value
        pair = [t.reshape(-1).view(torch.uint8) for t in (got[key], wide)]
        assert torch.equal(*pair), key
    lp.attach(model, LoRA(r=2))
    with pytest.raises(RuntimeError, match="that act and are not merged"):
        model.save_pretrained(tmp_path / "refused")


@FORMATS
def test_merge_to_dense_and_back(name: str, folders: Folders, tmp_path: Path) -> None:
    model = attached(packed(folders, name), LoRA(r=4, target_modules="all-linear"))
    before, held = logits(model), bits(model)
    lp.merge(model)
    assert_close("output after merge", logits(model), before)
    model.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").train()
    assert_close("saved and loaded", logits(plain), before)
    assert not hasattr(plain.config, "quantization_config")
    lp.unmerge(model)
    assert_bits(bits(model), held)
    assert (
        model.config.quantization_config["quant_method"]
        == RELEASED[name].quantization["quant_method"]
    )
    assert_same_bits("unmerged", logits(model), before)


@FORMATS
def test_merge_into_the_format(name: str, folders: Folders, tmp_path: Path) -> None:
    """Written by our encoder, read by `load_packed` and by the tests' own decoder."""
    model = attached(packed(folders, name), LoRA(r=4, target_modules="all-linear"))
    before, held = logits(model), bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = lp.merge(model, into="storage")
    requantised = [s for s in report.sites if s.noise is not None]
    assert all(0.2 < (s.kept or 0) < 1.8 for s in requantised)
    assert requantised
    assert "survives requantising" in str(report)
    merged = logits(model)
    assert_close("output", merged, before, floor=0.3)
    model.save_pretrained(tmp_path / "again")
    again = load_packed(AutoModelForCausalLM, tmp_path / "again", dtype=torch.float32).train()
    assert_same_bits("saved and loaded", logits(again), merged)
    values = RELEASED[name].values(load_file(tmp_path / "again" / "model.safetensors"))
    oracle = dense(folders, name)
    oracle.save_pretrained(tmp_path / "reference")
    save_state(tmp_path / "reference", values)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reference").train()
    assert_close("decoded by the tests", logits(loaded), merged, floor=1e-6)
    lp.unmerge(model)
    assert_bits(bits(model), held)


def test_survival_by_hand(folders: Folders) -> None:
    """`kept` and `noise` of one weight, and the warning when noise exceeds the update."""
    model = packed(folders, "mxfp4")
    lp.attach(model, LoRA(r=2, target_modules=["experts"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(0, 0.01 if n.endswith("B") else 0.02)
    site = model.model.layers[0].mlp.experts
    storage = storage_of(site, "down_proj")
    W = storage.read(site, "down_proj", torch.float32)
    lp.merge(model)
    merged = site.get_parameter("down_proj").detach().clone()
    lp.unmerge(model)
    with pytest.warns(UserWarning, match="more noise than the update"):
        report = lp.merge(model, into="storage")
    stored = storage.read(site, "down_proj", torch.float32)
    update = merged - W
    kept = ((stored - W) * update).sum() / update.square().sum()
    noise = (stored - merged).norm() / update.norm()
    found = next(s for s in report.sites if s.name.endswith("layers.0.mlp.experts.down_proj"))
    assert found.kept == pytest.approx(kept.item(), rel=1e-3)
    assert found.noise == pytest.approx(noise.item(), rel=1e-3)
    assert noise > 1


@FORMATS
def test_merge_and_unload(name: str, folders: Folders, tmp_path: Path) -> None:
    model = attached(packed(folders, name), LoRA(r=4, target_modules="all-linear"))
    before = logits(model)
    plain = lp.merge_and_unload(model)
    classes = {type(m) for m in dense(folders, name).modules()}
    assert {type(m) for m in plain.modules()} == classes
    assert_close("output", logits(plain), before)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert_close("saved and loaded", logits(loaded), before)


@FORMATS
def test_exchange(name: str, folders: Folders, tmp_path: Path) -> None:
    """A directory loads on the released and on the dequantised model, and in peft."""
    model = attached(packed(folders, name), LoRA(r=4, target_modules="all-linear"))
    lp.save_adapter(model, tmp_path / "ours")
    theirs: Any = peft.PeftModel.from_pretrained(dense(folders, name), tmp_path / "ours")
    assert_close("in peft", logits(theirs.train()), logits(model))
    twin = packed(folders, name)
    lp.load_adapter(twin, tmp_path / "ours")
    assert_same_bits("loaded", logits(twin), logits(model))


class Module(L.LightningModule):
    """Trains a causal language model."""

    def __init__(self, folder: str, quantised: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        if quantised:
            self.net = load_packed(AutoModelForCausalLM, folder, dtype=torch.float32).train()
        else:
            self.net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def batches() -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(torch.randint(0, 64, (6, 7), generator=generator), batch_size=2)  # type: ignore[arg-type]


def fit(module: Module, epochs: int, folder: Path | None = None, **options: Any) -> None:
    callbacks: list[Any] = [PEFT(LoRA(r=2, target_modules="all-linear"), report=False)]
    if folder is not None:
        callbacks.append(L.pytorch.callbacks.ModelCheckpoint(folder, save_last=True))
    precision = options.pop("precision", "32-true")
    torch.manual_seed(0)
    L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, enable_checkpointing=folder is not None,
        precision=precision,
    ).fit(module, batches(), **options)  # fmt: skip


@FORMATS
def test_trainer(name: str, folders: Folders, tmp_path: Path) -> None:
    """Fit, a file of adapters alone, exact resume; another base is refused."""
    folder = str(folders[name][0])
    straight = Module(folder)
    before = bits(straight)
    fit(straight, 2)
    assert_bits(bits(straight), before)
    first = Module(folder)
    fit(first, 1, tmp_path)
    stored = atomic_file.read(tmp_path / "last.ckpt")
    assert all(".peft." in key for key in stored_tensors(stored))
    resumed = Module(folder)
    fit(resumed, 2, ckpt_path=tmp_path / "last.ckpt")
    for (key, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), key
    loaded = lp.load_from_checkpoint(Module, tmp_path / "last.ckpt")
    assert_same_bits("loaded", logits(loaded.net.train()), logits(first.net))
    other = Module(folder)
    key = next(k for k in bits(other) if "scale" in k)
    other.get_parameter(key).data.view(-1)[0] ^= 1
    with pytest.raises(ValueError, match="expected the base it was trained on"):
        fit(other, 2, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_precision_plugins_cannot_cast(name: str, precision: str, folders: Folders) -> None:
    module = Module(str(folders[name][0]))
    before = bits(module)
    fit(module, 1, precision=precision)
    assert_bits(bits(module), before)
    module.half()
    assert_bits(bits(module), before)


# ---- copies and moves


@FORMATS
def test_copies(name: str, folders: Folders, tmp_path: Path) -> None:
    model = attached(packed(folders, name), LoRA(r=4, target_modules="all-linear"))
    want, held = logits(model), bits(model)
    twin = copy.deepcopy(model)
    assert_same_bits("deepcopy", logits(twin), want)
    assert_bits(bits(twin.to(torch.float16).to("cpu")), held)
    assert_same_bits("pickle", logits(pickle.loads(pickle.dumps(model))), want)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same_bits("torch.save", logits(again), want)
    lp.detach(model)
    twin = packed(folders, name)
    assert_bits(bits(model), bits(twin))
    assert_same_bits("detached", logits(model), logits(twin))


@FORMATS
def test_hooks_of_accelerate(name: str, folders: Folders) -> None:
    """Hooks replace the forward of an instance; ours runs inside of them."""
    model, plain = packed(folders, name), packed(folders, name)
    seen: list[nn.Module] = []

    class Note(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    hooked = [m for m in model.modules() if held_tensors(m)]
    for m in hooked:
        add_hook_to_module(m, Note())
    for m in (model, plain):
        attached(m, LoRA(r=4, target_modules="all-linear"))
    assert_same_bits("output", logits(model), logits(plain))
    assert set(seen) == set(hooked)
    got, want = gradients(model), gradients(plain)
    assert set(got) == set(want)
    for key, value in want.items():
        assert_same_bits(key, got[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_compiled(name: str, folders: Folders) -> None:
    model = attached(packed(folders, name), LoRA(r=4, target_modules="all-linear"))
    layer, width = model.model.layers[0], model.config.hidden_size
    x = torch.randn(2, 5, width, requires_grad=True)
    torch._dynamo.reset()
    for part in (layer.mlp, layer.self_attn.q_proj):
        want, got = (
            first(run(x))
            for run in (part, torch.compile(part, backend="aot_eager", fullgraph=True))
        )
        assert_close("output", got.detach(), want.detach())
        found, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want))
        assert_close("gradient", found, expected)


def first(output: Any) -> Tensor:
    """gpt-oss also returns the routers' scores."""
    y: Tensor = output[0] if isinstance(output, tuple) else output
    return y


# ---- what is refused, and other storages


@pytest.mark.parametrize("name", ["fp8", "fp8 experts", "mxfp4"])
def test_selected_weights(name: str, folders: Folders) -> None:
    """Methods that train the model's own parameters never take codes or scales."""
    label = RELEASED[name].label
    for method in (Full(), LastLayers(n=1)):
        model = packed(folders, name)
        before = bits(model)
        with pytest.raises(ValueError, match=f"expected a dense weight .* got {label}"):
            lp.attach(model, method)
        assert_bits(bits(model), before)
    model = packed(folders, name)
    lp.attach(model, LoRA(r=2), modules_to_save=["lm_head"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not trained & set(bits(model))
    assert any("lm_head" in n for n in trained)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_would_be_rounded(init: str, folders: Folders) -> None:
    model = packed(folders, "fp8")
    before = bits(model)
    with pytest.raises(ValueError, match=r"expected a base that the start can rewrite.*fp8"):
        lp.attach(model, LoRA(r=2, init=init, target_modules=["q_proj"]))  # type: ignore[arg-type]
    assert_bits(bits(model), before)
    assert not any("peft" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("name", ["fp8", "fp8 experts", "mxfp4"])
def test_transcoded(name: str, folders: Folders, tmp_path: Path) -> None:
    """`Quantization("nf4")` gives the bytes of quantising the dequantised model."""
    method = LoRA(r=4, target_modules="all-linear")
    model, oracle = packed(folders, name), dense(folders, name)
    for m in (model, oracle):
        torch.manual_seed(0)
        lp.attach(m, method, quantization=Quantization("nf4", block_size=32))
        move(m)
    assert {g.storage for g in lp.parameter_report(model).groups} == {"nf4"}
    assert_bits(bits(model), bits(oracle))
    assert_same_bits("output", logits(model), logits(oracle))
    plain = lp.merge_and_unload(model)
    assert {type(m) for m in plain.modules()} == {type(m) for m in dense(folders, name).modules()}
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert_close("saved and loaded", logits(loaded), logits(plain))


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_sharding_is_refused_by_name(name: str, folders: Folders) -> None:
    model = packed(folders, name)
    lp.attach(model, LoRA(r=2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=rf"in {name}: codes and scales of {name} are not cut"):
            shard_model(model, init_device_mesh("cpu", (1,)), torch.device("cpu"), Options())
    finally:
        dist.destroy_process_group()


@FORMATS
def test_report_and_plan(name: str, folders: Folders) -> None:
    """Bytes of the files; the planner counts from config.json what `attach` makes."""
    method = LoRA(r=2, target_modules="all-linear")
    model = packed(folders, name)
    report = lp.attach(model, method)
    want, plain = (load_file(f / "model.safetensors") for f in folders[name])
    kept = {k for k, t in want.items() if k in plain and plain[k].dtype == t.dtype}
    dropped = () if name == "gptq desc_act" else ("g_idx",)  # groups of neighbouring inputs
    packed_keys = [k for k in want if k not in kept and not k.endswith(dropped)]
    nbytes = sum(want[k].nbytes for k in packed_keys)
    weights = sum(t.numel() for k, t in plain.items() if k not in kept)
    rel = 0.05 if name.startswith(("awq", "gptq")) else 0.002  # zero points are held as bytes
    assert report.nbytes["quantised base"] == pytest.approx(nbytes, rel=rel)
    assert "bits per weight" in " ".join(str(report).split())
    if len(report.bits) == 1:
        assert report.bits[RELEASED[name].label] == pytest.approx(8 * nbytes / weights, rel=rel)
    plan = lp.estimate_memory(folders[name][0], method, precision="32-true", batch_size=1)
    for label, nbytes in report.storages.items():
        assert plan.sizes.base[label][1] == pytest.approx(nbytes, rel=0.002)
    assert plan.sizes.total == report.total


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)
