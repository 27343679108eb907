"""A base on the meta device, read row by row and quantised on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_peft import LoRA, Quantization, attach, reset_adapters
from lightning_peft.storage.materialize import materialize
from lightning_peft.storage.streaming import stream_base
from tests.helpers.distributed.jobs import Job, build
from tests.helpers.distributed.processes import Processes, difference, result, run
from tests.helpers.tiny_models import BUILDERS, example_inputs, main_output

pytestmark = [pytest.mark.usefixtures("lightning_package"), pytest.mark.one_package]

FSDP: dict[str, Any] = {"devices": 2, "strategy": "peft_fsdp"}
reads_into_shards = pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="peft_fsdp reads a base into shards from torch 2.13 on",
)


def save_sharded(model: nn.Module, folder: Path, files: int = 3) -> None:
    """As `save_pretrained` would, in several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    names = list(state)
    where = {n: f"model-{i % files:05d}.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(
    ("name", "block_size"), [("llama", 32), ("llama", 64), ("gpt2", 32), ("mixtral", 32)]
)
def test_bytes_are_those_of_the_whole(
    name: str, block_size: int, double_quant: bool, tmp_path: Path
) -> None:
    """On one process: rows of rows, blocks across rows, transposed weights, experts."""
    quantization = Quantization("nf4", block_size=block_size, double_quant=double_quant)
    whole = BUILDERS[name]()
    if name == "gpt2":  # tied: the file holds it once
        whole.config.tie_word_embeddings = True
    save_sharded_once(whole, tmp_path)
    with torch.device("meta"):
        read = BUILDERS[name]()
    for model in (whole, read):
        attach(model, LoRA(r=2, target_modules="all-linear"), quantization=quantization)
    materialize(read, torch.device("cpu"))
    reset_adapters(read)
    stream_base(read, tmp_path, chunk=1 << 10)
    want, have = whole.state_dict(), read.state_dict()
    assert want.keys() == have.keys()
    different = [k for k in want if ".peft." not in k and not torch.equal(want[k], have[k])]
    assert different == []
    inputs = example_inputs(name)
    assert torch.equal(main_output(whole(**inputs)), main_output(read(**inputs)))


def save_sharded_once(model: nn.Module, folder: Path) -> None:
    """Tied tensors under their first name only."""
    seen: set[int] = set()
    kept = nn.Module()
    state = {}
    for key, t in model.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            state[key] = t.detach()
    kept.state_dict = lambda: state  # type: ignore[assignment, method-assign]
    save_sharded(kept, folder)


def test_missing_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    whole = BUILDERS["llama"]()
    state = {k: v.contiguous() for k, v in whole.state_dict().items()}
    state["model.norm.weight"] = torch.zeros(3)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="2 differences") as caught:
        stream_base(whole, tmp_path)
    assert "model.layers.1.mlp.up_proj.weight: missing" in str(caught.value)
    assert "model.norm.weight: expected shape [32], got [3]" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"expected \*\.safetensors"):
        stream_base(whole, tmp_path / "nowhere")


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_are_not_read_as_weights(
    quantization: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {k: v.contiguous() for k, v in BUILDERS["llama"]().state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**state, name: state[name].to(dtype)}, tmp_path / "model.safetensors")
    model = BUILDERS["llama"]()
    attach(model, LoRA(r=2, target_modules="all-linear"), quantization=quantization)
    with pytest.raises(
        ValueError, match=rf"1 difference; nothing was read:\n  {name}: .* codes in"
    ):
        stream_base(model, tmp_path)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    model = BUILDERS["llama"]()
    save_sharded(model, tmp_path, files=1)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="expected whole safetensors files, got one"):
        stream_base(model, tmp_path)


@reads_into_shards
def test_two_processes_read_their_own_rows(tmp_path: Path) -> None:
    """Training over a streamed base is training over a loaded one."""
    job = Job("loaded", str(tmp_path), epochs=1, **FSDP)
    save_sharded(build(job), tmp_path / "base")
    base = str(tmp_path / "base")
    streamed = Job("streamed", str(tmp_path), epochs=1, meta_from=base, **FSDP)
    single = Job("single", str(tmp_path), epochs=1, meta_from=base, double_quant=False, **FSDP)
    wide = Job("wide", str(tmp_path), epochs=1, meta_from=base, block_size=64, **FSDP)
    run(2, [job, streamed, single, wide], tmp_path)
    assert difference(job, streamed) <= 1e-6
    loaded, read = result(job)["packed"], result(streamed)["packed"]
    assert all(torch.equal(loaded[k], read[k]) for k in loaded)


@reads_into_shards
def test_a_wrong_base_is_refused_whichever_run_streams(tmp_path: Path) -> None:
    """Streamed to streamed, streamed to dense, dense to streamed; the right base passes."""
    dense = Job("dense", str(tmp_path), epochs=1, **FSDP)
    base, other = str(tmp_path / "base"), str(tmp_path / "other")
    save_sharded(build(dense), Path(base))
    save_sharded(build(replace(dense, base_seed=[8])), Path(other))
    streamed = replace(dense, name="streamed", meta_from=base)
    saved = {job.name: str(tmp_path / f"{job.name}-last.ckpt") for job in (dense, streamed)}
    run(2, [dense, streamed], tmp_path)
    right = [
        replace(streamed, name="a", epochs=2, ckpt=saved["streamed"]),
        replace(dense, name="b", epochs=2, ckpt=saved["streamed"]),
        replace(streamed, name="c", epochs=2, ckpt=saved["dense"]),
        replace(dense, name="d", epochs=2, ckpt=saved["dense"]),
    ]
    run(2, right, tmp_path)
    assert max(difference(right[3], job) for job in right) <= 1e-6
    wrong = [
        replace(streamed, name="e", meta_from=other, ckpt=saved["streamed"]),
        replace(dense, name="f", base_seed=[8], ckpt=saved["streamed"]),
        replace(streamed, name="g", meta_from=other, ckpt=saved["dense"]),
    ]
    for job in wrong:
        group = Processes(2, [job], tmp_path)
        assert group.wait(60) == [1, 1], group.text()
        for log in group.logs:
            assert "expected the base it was trained on, got another one" in log.read_text()


ONE: dict[str, Any] = {"devices": 1, "strategy": "auto"}
DDP: dict[str, Any] = {"devices": 2, "strategy": "peft_ddp"}


@pytest.mark.parametrize("where", [ONE, DDP], ids=["one", "ddp"])
def test_a_base_is_read_without_sharding(where: dict[str, Any], tmp_path: Path) -> None:
    """On one device and under DDP; from the base, into the cache, and from the cache."""
    loaded = Job("loaded", str(tmp_path), epochs=1, **where)
    base, cache = str(tmp_path / "base"), str(tmp_path / "cache")
    save_sharded(build(loaded), Path(base))
    read = replace(loaded, name="read", meta_from=base)
    filling = replace(read, name="filling", packed_cache=cache)
    cached = replace(filling, name="cached")
    pissa = replace(cached, name="pissa", method_options={"init": "pissa"})
    pissa_loaded = replace(loaded, name="pissa loaded", method_options={"init": "pissa"})
    jobs = [loaded, read, filling, cached, pissa, pissa_loaded]
    run(where["devices"], jobs, tmp_path)
    for job in (read, filling, cached):
        assert difference(loaded, job) <= 1e-6
        want, have = result(loaded)["packed"], result(job)["packed"]
        assert all(torch.equal(want[k], have[k]) for k in want)
    assert difference(pissa_loaded, pissa) <= 1e-6
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "rank-00000.bin"]


@reads_into_shards
def test_a_cache_of_two_processes_serves_any_number(tmp_path: Path) -> None:
    """Written by two ranks in shards, read by two and by one; other settings get another folder."""
    loaded = Job("loaded", str(tmp_path), epochs=1, **FSDP)
    base, cache = str(tmp_path / "base"), str(tmp_path / "cache")
    save_sharded(build(loaded), Path(base))
    filling = replace(loaded, name="filling", meta_from=base, packed_cache=cache)
    cached = replace(filling, name="cached")
    run(2, [loaded, filling, cached], tmp_path)
    one = Job("one", str(tmp_path), epochs=1, meta_from=base, packed_cache=cache)
    run(1, [one], tmp_path)
    want = result(loaded)["packed"]
    for job in (filling, cached, one):
        have = result(job)["packed"]
        assert all(torch.equal(want[k], have[k]) for k in want), job.name
    assert difference(loaded, cached) <= 1e-6
    assert len(list((tmp_path / "cache").iterdir())) == 1
    other = replace(one, name="other", double_quant=False)
    resumed = replace(one, name="resumed", epochs=2, ckpt=str(tmp_path / "filling-last.ckpt"))
    wrong = str(tmp_path / "wrong")
    save_sharded(build(replace(loaded, base_seed=[8])), Path(wrong))
    run(1, [other, resumed], tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # A cached base has the fingerprint of its files: a wrong one is refused from the cache too.
    for name in ("first", "second"):
        job = replace(resumed, name=name, meta_from=wrong)
        group = Processes(1, [job], tmp_path)
        assert group.wait(60) == [1], group.text()
        assert "expected the base it was trained on, got another one" in group.text()


QUICK = ("PiSSA", "DoRA", "VeRA")
STARTS: dict[str, dict[str, Any]] = {
    "PiSSA": {"method_options": {"init": "pissa"}},
    "OLoRA dense": {"method_options": {"init": "olora"}, "quantization": None},
    "LoftQ": {"method_options": {"init": "loftq"}},
    "LoftQ, blocks across rows": {"method_options": {"init": "loftq"}, "block_size": 64},
    "DoRA": {"method": "DoRA"},
    "DoRA from PiSSA": {"method": "DoRA", "method_options": {"init": "pissa"}},
    "PiSSA on Conv1D": {"method_options": {"init": "pissa"}, "model": "gpt2"},
    "VeRA": {"method": "VeRA"},
    "experts": {"model": "mixtral", "method_options": {"init": "pissa"}},
    "bottleneck": {"method": "BottleneckAdapter"},
}


@reads_into_shards
@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param([n for n in STARTS if n not in QUICK], marks=pytest.mark.slow)],
    ids=["quick", "rest"],
)
def test_starts_that_need_the_weight(names: Sequence[str], tmp_path: Path) -> None:
    """Made as each weight is read: the base, its residual and training as over a loaded base."""
    pairs = []
    for name in names:
        given = STARTS[name]
        loaded = Job(f"{name} loaded", str(tmp_path), epochs=1, **FSDP, **given)
        base = tmp_path / loaded.model
        if not base.exists():
            save_sharded(build(loaded), base)
        pairs.append((loaded, replace(loaded, name=f"{name} read", meta_from=str(base))))
    run(2, [job for pair in pairs for job in pair], tmp_path)
    for loaded, read in pairs:
        want, have = result(loaded)["packed"], result(read)["packed"]
        assert want.keys() == have.keys()
        assert [k for k in want if not torch.equal(want[k], have[k])] == [], loaded.name
        assert difference(loaded, read) <= 1e-6, loaded.name


@reads_into_shards
def test_prompts_over_a_base_that_is_not_read_yet_are_refused(tmp_path: Path) -> None:
    job = Job("prompts", str(tmp_path), method="PromptTuning", **FSDP)
    save_sharded(build(job), tmp_path / "base")
    job.meta_from, job.method_options = str(tmp_path / "base"), {"target_modules": None}
    group = Processes(2, [job], tmp_path)
    assert group.wait(60) == [1, 1]
    assert "expected an adapter that can start before the base is read" in group.text()


@reads_into_shards
def test_no_process_holds_the_dense_model(tmp_path: Path) -> None:
    """309 MB in fp32 on disk: reading takes less than a quarter of it, training less than a
    third (gathered blocks and gloo's buffers).
    """
    job = Job("large", str(tmp_path), model="large", epochs=1, watch_memory=True, **FSDP)
    model = build(job)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    save_sharded(model, tmp_path / "base")
    del model
    job.meta_from = str(tmp_path / "base")
    small = Job("small", str(tmp_path), epochs=1, **FSDP)  # what a first run imports and keeps
    run(2, [small, job], tmp_path)
    read = [result(job, rank)["growth at start"] for rank in (0, 1)]
    grown = [result(job, rank)["growth"] for rank in (0, 1)]
    megabytes = [[round(g / 1e6) for g in each] for each in (read, grown)]
    print(f"dense {dense / 1e6:.0f} MB; after reading, at the end: {megabytes} MB")
    assert max(read) < dense / 4, megabytes
    assert max(grown) < dense / 3, megabytes
