"""`export_merged`: equal to merging in memory; an error leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lightning_peft as lp
from lightning_peft.__main__ import main
from lightning_peft.hf import shards
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.method_cases import CASES
from tests.helpers.peft_exchange import build, randomise, run

NF4 = lp.Quantization("nf4", block_size=32)


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def saved(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in sorted(directory.glob("*.safetensors")) for k, t in load_file(f).items()}


def exported(tmp_path: Path, model, **settings) -> tuple[Path, lp.ExportReport]:
    """The adapter of `model` written, then merged into ``base`` on disk."""
    lp.save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "out"
    settings = {"dtype": None, "progress": False, **settings}
    return out, lp.export_merged(tmp_path / "adapter", tmp_path / "base", out, **settings)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("tied", "rest"),
    [
        (False, {"modules_to_save": ["lm_head"]}),
        (True, {}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_the_same_tensors_as_in_memory(tied, rest, quantization, tmp_path) -> None:
    model = llama(tie_word_embeddings=tied)
    saved(model, tmp_path / "base")
    lp.attach(model, lp.LoRA(r=4), quantization=quantization, **rest)
    randomise(model, std=0.1)
    out, report = exported(tmp_path, model)
    want = lp.merge_and_unload(model)
    saved(want, tmp_path / "want")
    got, expected = tensors(out), tensors(tmp_path / "want")
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(key, got[key], value, floor=1e-6)
    assert report.error["trained"] < 1e-6
    fresh, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert fresh.config.tie_word_embeddings == want.config.tie_word_embeddings


def test_both_bases_are_measured_and_one_is_written(tmp_path) -> None:
    model = llama()
    saved(model, tmp_path / "base")
    lp.attach(model, lp.LoRA(r=4), quantization=NF4)
    randomise(model, std=0.1)
    _, trained = exported(tmp_path, model)
    shutil.move(tmp_path / "out", tmp_path / "trained")
    out, original = exported(tmp_path, model, onto="original")
    assert trained.error == original.error
    assert original.error["trained"] < 1e-6
    assert original.error["original"] > 0.02
    name = "model.layers.0.self_attn.q_proj.weight"
    base = tensors(tmp_path / "base")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = f"base_model.model.{name.removesuffix('weight')}"
    delta = 2.0 * adapter[f"{head}lora_B.weight"] @ adapter[f"{head}lora_A.weight"]
    assert_close("original", tensors(out)[name], base[name] + delta, floor=1e-6)
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert_same_bits("untouched", tensors(out)[untouched], base[untouched])
    assert "(written)" in str(original).splitlines()[2]


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2", "phi3", "t5", "vit"])
def test_architectures(name, tmp_path) -> None:
    model, inputs = build(name)
    saved(model, tmp_path / "base")
    lp.attach(model, lp.LoRA(r=2))
    randomise(model, std=0.1)
    out, _ = exported(tmp_path, model)
    want = run(model, inputs)
    again = type(build(name)[0]).from_pretrained(out)
    assert_close("exported", run(again.eval(), inputs), want, floor=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        lp.RoAd(group_size=2, target_modules=["query"]),
        lp.IA3(target_modules=["query"], feedforward_modules=[]),
        lp.LoRA(r=2, target_modules=["query"], lora_bias=True),
    ],
    ids=["road", "ia3", "lora_bias"],
)
def test_changed_biases(method, tmp_path) -> None:
    model, inputs = build("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("query.bias"):
                parameter.normal_()
    saved(model, tmp_path / "base")
    lp.attach(model, method)
    randomise(model, std=0.1)
    out, _ = exported(tmp_path, model)
    want = run(model, inputs)
    again = type(model).from_pretrained(out)
    assert_close("exported", run(again.eval(), inputs), want, floor=1e-4)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["experts", "attention"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss"])
def test_experts_that_lie_in_files_of_their_own(name, targets, quantization, tmp_path) -> None:
    """What `save_pretrained` writes after merging in memory: for some a tensor per expert."""
    model, inputs = build(name)
    saved(model, tmp_path / "base")
    lp.attach(model, lp.LoRA(r=2, target_modules=targets), quantization=quantization)
    randomise(model, std=0.1)
    out, report = exported(tmp_path, model)
    want = run(model, inputs)
    saved(lp.merge_and_unload(model), tmp_path / "want")
    got, expected = tensors(out), tensors(tmp_path / "want")
    assert got.keys() == expected.keys() == tensors(tmp_path / "base").keys()
    for key, value in expected.items():
        assert_close(key, got[key], value, floor=1e-6)
    assert report.error["trained"] < 1e-6
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    assert_close("exported", run(again, inputs), want, floor=1e-4)


MERGEABLE = [c for c in CASES if c.method.mergeable and c.name != "lora_bias"]


@pytest.mark.sweep(0.25)
@pytest.mark.parametrize("case", MERGEABLE, ids=lambda c: c.name)
def test_methods(case, tmp_path) -> None:
    if case.name == "beft":
        pytest.skip("it adds a bias where the library's config knows none")
    model, inputs = build("llama")
    saved(model, tmp_path / "base")
    plain = run(model, inputs)
    leaves = {
        name: ["q_proj", "v_proj"]
        for name in ("blocks_a", "blocks_b")
        if getattr(case.method, name, None)
    }
    start = {"init": "default"} if getattr(case.method, "init", "") in ("loftq",) else {}
    lp.attach(model, replace(case.method, target_modules=["q_proj", "v_proj"], **leaves, **start))
    randomise(model, std=0.3)
    try:
        out, _ = exported(tmp_path, model)
    except ValueError as error:
        pytest.skip(str(error)) if "save_adapter" in str(error) else None
        raise
    want = run(model, inputs)
    assert (want - plain).norm() > 1e-3 * plain.norm()  # else any error would pass
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    assert_close("exported", run(again, inputs), want, floor=1e-4)


# ---- files


def qlora(tmp_path: Path) -> LlamaForCausalLM:
    """A base and an adapter on disk."""
    model = llama()
    saved(model, tmp_path / "base")
    lp.attach(model, lp.LoRA(r=4), quantization=NF4)
    randomise(model, std=0.1)
    lp.save_adapter(model, tmp_path / "adapter")
    return model


def test_shards_tokenizer_and_config(tmp_path, capsys) -> None:
    qlora(tmp_path)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder, text in ((base, "base"), (adapter, "adapter")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"from": text}))
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    arguments = ["merge", "--base", base, "--adapter", adapter, "--out", out]
    assert main([*map(str, arguments), "--shard-size", "40KB"]) == 0
    assert "merged 4 of 21 tensors" in capsys.readouterr().out
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 1
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(out).values())
    assert all((out / f).stat().st_size < 45_000 for f in files)
    assert {t.dtype for t in tensors(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"from": "adapter"}
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert not (out / "pytorch_model.bin").exists()
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def another_base(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"].add_(0.1)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def another_architecture(folder: Path) -> None:
    shutil.rmtree(folder)
    saved(build("bert")[0], folder)


def missing_shards(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def quantised_on_disk(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (cut_short, ValueError, "complete safetensors file, got .* bytes"),
        (another_base, ValueError, r"other values in model\.layers\.1\.self_attn\.q_proj"),
        (another_architecture, ValueError, "is this the right base model"),
        (missing_shards, FileNotFoundError, "expected the 2 shards .*, found 0; missing"),
        (quantised_on_disk, ValueError, "ones quantised on disk by bitsandbytes"),
        (shutil.rmtree, FileNotFoundError, "directory of a model with config.json, found none"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_base_that_does_not_fit(spoil, error, match, tmp_path) -> None:
    qlora(tmp_path)
    spoil(tmp_path / "base")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=match):
        lp.export_merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"adapter": "base"}, FileNotFoundError, "expected adapter_config.json"),
        ({"base": "adapter"}, FileNotFoundError, "config.json, found an adapter"),
        ({"out": "base"}, FileExistsError, "absent or empty, found . files; remove it"),
        ({"out": "base/config.json/out"}, FileExistsError, "base/config.json is a file; remove it"),
        ({"dtype": "int8"}, ValueError, "floating dtype such as 'bfloat16', or None, got 'int8'"),
        ({"shard_size": "many"}, ValueError, "such as '5GB' or '500MB', got 'many'"),
        ({"onto": "both"}, ValueError, "'trained' or 'original', got 'both'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit(given, error, match, tmp_path) -> None:
    qlora(tmp_path)
    places = {name: tmp_path / given.get(name, name) for name in ("adapter", "base", "out")}
    with pytest.raises(error, match=match):
        lp.export_merged(**{**given, **places}, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_file_that_is_cut_short(tmp_path) -> None:
    qlora(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors: .* got 100 bytes that do not"
    ):
        lp.export_merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_hub_id_without_network_names_the_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="in the local cache or can be downloaded"):
        lp.export_merged("nobody/nothing", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("free", [0, 10**9], ids=["seen before", "in between"])
def test_a_full_disk_leaves_nothing(free, tmp_path, monkeypatch) -> None:
    qlora(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    if free:

        def full(*given: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shards, "_write_index", full)
    with pytest.raises(OSError, match=r"bytes and more on this disk, got .* nothing was written"):
        lp.export_merged(
            tmp_path / "adapter", tmp_path / "base", tmp_path / "out", None, "20KB", progress=False
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_a_killed_export_leaves_no_directory_and_the_next_cleans_up(tmp_path) -> None:
    qlora(tmp_path)
    code = (
        "import os, sys, lightning_peft as lp, lightning_peft.hf.shards as shards\n"
        "shards._write_index = lambda *given: os.kill(os.getpid(), 9)\n"
        "from pathlib import Path\nat = Path(sys.argv[1])\n"
        "lp.export_merged(at / 'adapter', at / 'base', at / 'out', None, '20KB', progress=False)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    left = [p.name for p in tmp_path.iterdir() if p.name not in ("adapter", "base")]
    assert len(left) == 1
    assert left[0].startswith(".out.export-")
    lp.export_merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_experts_keep_their_order(tmp_path) -> None:
    """Names in files are sorted as text, in which expert 10 comes before expert 2."""
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=12,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    base = tensors(saved(model, tmp_path / "base"))
    assert sum(".experts." in key for key in base) == 36
    targets = ["gate_up_proj", "down_proj"]
    lp.attach(model, lp.LoRA(r=2, target_modules=targets), quantization=NF4)
    randomise(model, std=0.1)
    out, _ = exported(tmp_path, model)
    want = tensors(saved(lp.merge_and_unload(model), tmp_path / "want"))
    for key, value in tensors(out).items():
        assert_close(key, value, want[key], floor=1e-6)
    experts = [key for key in base if ".experts." in key]
    assert not any(torch.equal(tensors(out)[key], base[key]) for key in experts)
