"""Files that do not fit: a clear error, and the model as before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.peft_exchange import build, by_peft, run, trained

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def config(**changes: Any) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        data = json.loads((d / CONFIG).read_text())
        for key, value in changes.items():
            if value is KeyError:
                del data[key]
            else:
                data[key] = value
        (d / CONFIG).write_text(json.dumps(data))

    return change


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        data = load_file(d / TENSORS)
        edit(data)
        save_file(data, d / TENSORS)

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(content) and None


def truncate(d: Path) -> None:
    content = (d / TENSORS).read_bytes()
    (d / TENSORS).write_bytes(content[: len(content) // 2])


def pickled(d: Path) -> None:
    torch.save(load_file(d / TENSORS), d / "adapter_model.bin")
    (d / TENSORS).unlink()


def nan(data: dict[str, Tensor]) -> None:
    data[KEY][0, 0] = float("nan")


HUGE_HEADER = (1 << 62).to_bytes(8, "little") + b"{}"
BAD: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no config": (lambda d: (d / CONFIG).unlink(), FileNotFoundError, "adapter_config.json"),
    "no tensors": (lambda d: (d / TENSORS).unlink(), FileNotFoundError, "found none"),
    "pickle": (pickled, ValueError, "adapter_model.bin; a pickle"),
    "not JSON": (write(CONFIG, b"{'r': 4"), ValueError, "expected JSON"),
    "not UTF-8": (write(CONFIG, b"\xff\xfe{"), ValueError, "expected JSON"),
    "deep JSON": (write(CONFIG, b"[" * 200_000), ValueError, "expected JSON"),
    "a list": (write(CONFIG, b"[1, 2]"), ValueError, "JSON object, got list"),
    "no peft_type": (config(peft_type=KeyError), ValueError, ("peft_type: expected a string, got "
                                                             "None")),
    "other peft_type": (config(peft_type="OTHER"), ValueError, "expected one of .*got 'OTHER'"),
    "no r": (config(r=KeyError), ValueError, "expected 'r'"),
    "no alpha": (config(lora_alpha=KeyError), ValueError, "expected 'lora_alpha'"),
    "no targets": (config(target_modules=KeyError), ValueError, "expected 'target_modules'"),
    "r a string": (config(r="4"), ValueError, "r: expected an integer, got '4'"),
    "r a bool": (config(r=True), ValueError, "r: expected an integer, got True"),
    "r zero": (config(r=0), ValueError, "rank|r = 0"),
    "r absurd": (config(r=10**12), ValueError, "expected rank 1000000000000"),
    "r other": (config(r=8), ValueError, "expected rank 8"),
    "alpha a list": (config(lora_alpha=[8]), ValueError, "lora_alpha: expected a finite number"),
    "alpha infinite": (config(lora_alpha=float("inf")), ValueError, "a finite number, got inf"),
    "alpha negative": (config(lora_alpha=-1), ValueError, "alpha > 0, got alpha = -1"),
    "dropout 1": (config(lora_dropout=1.0), ValueError, "dropout < 1, got dropout = 1"),
    "targets a number": (config(target_modules=3), ValueError, ("target_modules: expected a string "
                                                               "or")),
    "targets mixed": (config(target_modules=["q", 3]), ValueError, ("target_modules: expected a "
                                                                   "string or")),
    "targets no regex": (config(target_modules="(q"), ValueError, ("a regular expression, got "
                                                                  "'\\(q'")),
    "more targets": (
        config(target_modules=["q_proj", "v_proj", "k_proj"]), ValueError, "missing: .*k_proj",
    ),
    "fewer targets": (config(target_modules=["q_proj"]), ValueError, "extra: .*v_proj"),
    "patterns a list": (config(rank_pattern=[1]), ValueError, "rank_pattern: expected an object"),
    "pattern of strings": (config(rank_pattern={"q": "2"}), ValueError, ("rank_pattern: expected "
                                                                        "names")),
    "pattern no regex": (config(rank_pattern={"(q": 2}), ValueError, "rank_pattern: expected a"),
    "layers a string": (config(layers_to_transform="0"), ValueError, ("layers_to_transform: "
                                                                     "expected")),
    "bias unknown": (config(bias="some"), ValueError, "bias in .*got 'some'"),
    "saved a string": (config(modules_to_save="norm"), ValueError, ("modules_to_save: expected a "
                                                                   "list")),
    "saved absent": (config(modules_to_save=["lm_head"]), ValueError, ("missing "
                                                                      "base_model.model.lm_head")),
    "unknown field": (config(shiny_option=3), ValueError, "shiny_option = 3"),
    "option on": (config(use_qalora=True), ValueError, "use_qalora: .*GPTQ layers.*NF4"),
    "replicated layers": (
        config(layer_replication=[[0, 1]]), ValueError,
        "layer_replication: .*peft's own merge is wrong. Build the deeper model first",
    ),
    "FRoD": (config(peft_type="FROD"), ValueError, "got FROD: .*another dtype.*Merge it with peft"),
    "ShadowPEFT": (config(peft_type="SHADOW"), ValueError, "second transformer.*Run it with peft"),
    "random start": (config(init_lora_weights="pissa_niter_4"), ValueError, "'pissa_niter_4'"),
    "tokens": (config(trainable_token_indices=[1, 2]), ValueError, "missing .*trainable_tokens"),
    "empty file": (write(TENSORS, b""), ValueError, "whole safetensors file, got 0 bytes"),
    "truncated": (truncate, ValueError, "whole safetensors file"),
    "absurd header": (write(TENSORS, HUGE_HEADER), ValueError, "whole safetensors file"),
    "missing": (tensors(lambda t: t.pop(KEY)), ValueError, "missing .*q_proj.lora_A.weight"),
    "extra": (
        tensors(lambda t: t.update({"base_model.model.x.weight": torch.ones(2)})),
        ValueError, "extra base_model.model.x.weight",
    ),
    "extra tensor of a layer": (
        tensors(lambda t: t.update({KEY.replace("lora_A.weight", "lora_B.bias"): torch.ones(32)})),
        ValueError, "extra .*lora_B.bias",
    ),
    "another model": (
        tensors(lambda t: t.update({KEY.replace("layers.0", "layers.7"): t.pop(KEY)})),
        ValueError, "layers.7.self_attn.q_proj.*right base model",
    ),
    "no prefix": (
        tensors(lambda t: t.update({KEY[len("base_model.model."):]: t.pop(KEY)})),
        ValueError, "missing|extra",
    ),
    "misshapen": (
        tensors(lambda t: t.update({KEY: torch.ones(4, 31)})),
        ValueError, r"expected shape \[4, 32\], got \[4, 31\]",
    ),
    "flat": (tensors(lambda t: t.update({KEY: torch.ones(128)})), ValueError, "expected 2 axes"),
    "NaN": (tensors(nan), ValueError, "got 1 NaN or infinite of 128"),
    "integers": (
        tensors(lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int64)})),
        ValueError, "floating dtype, got torch.int64",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    by_peft(build("llama")[0], directory, r=4, target_modules=["q_proj", "v_proj"])
    return directory


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [type(m) for m in model.modules()],
        "tensors": {k: t.clone() for k, t in model.state_dict().items()},
        "grad": [p.requires_grad for p in model.parameters()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after["classes"] == before["classes"]
    assert after["grad"] == before["grad"]
    assert after["attributes"] == before["attributes"]
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(t, before["tensors"][k]) for k, t in after["tensors"].items())


@pytest.mark.parametrize("case", BAD)
def test_bad(case: str, good: Path, tmp_path: Path) -> None:
    change, error, message = BAD[case]
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    model, _ = build("llama")
    before, rng = state(model), torch.get_rng_state()
    with pytest.raises(error, match=f"(?s){message}") as caught:
        lp.load_adapter(model, tmp_path)
    assert str(caught.value).startswith(str(tmp_path)), "the message says where the files are"
    assert_same_state(model, before)
    assert torch.equal(rng, torch.get_rng_state())


def test_options_that_are_off_do_not_matter(good: Path, tmp_path: Path) -> None:
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config(from_the_future=None, also_new=False, runtime_config={"x": 1})(tmp_path)
    model, inputs = build("llama")
    plain = copy.deepcopy(model)
    lp.load_adapter(model, tmp_path)
    lp.load_adapter(plain, good)
    assert torch.equal(run(model, inputs), run(plain, inputs))


def test_a_name_that_is_taken(good: Path) -> None:
    model, inputs = build("llama")
    lp.load_adapter(model, good)
    want = run(model, inputs)
    with pytest.raises(RuntimeError, match="'default', which is attached"):
        lp.load_adapter(model, good)
    assert torch.equal(run(model, inputs), want)


def test_embeddings_beside_the_adapter_must_be_the_bases(tmp_path: Path) -> None:
    """peft writes the whole embedding beside an adapter on it: equal to the base, or it is another
    base.
    """
    base, _ = build("llama")
    by_peft(base, tmp_path, r=4, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(tmp_path / TENSORS)
    lp.load_adapter(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        base.get_parameter("model.embed_tokens.weight")[3, 3] += 1
    with pytest.raises(ValueError, match="a copy of the base that differs"):
        lp.load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), "'reflect'"),
        (nn.Conv1d(4, 4, 3, dilation=2), r"dilation, the base has \(2,\)"),
        (nn.MultiheadAttention(4, 1, kdim=2), "kdim or vdim"),
    ],
    ids=["reflect", "dilation", "kdim"],
)
def test_layers_without_an_equal(layer: nn.Module, message: str, tmp_path: Path) -> None:
    model = trained(nn.Sequential(layer), lp.LoRA(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=message):
        lp.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_adapter(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="expected one of the attached adapters \\['default'\\]"):
        lp.save_adapter(trained(build("llama")[0], lp.LoRA(r=2)), tmp_path, adapter_name="other")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    model = trained(build("llama")[0], lp.LoRA(r=2))
    lp.save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        lp.save_adapter(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
