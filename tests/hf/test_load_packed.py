"""`load_packed`: what it refuses, and which quantizers of transformers it reads."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from lightning_peft import LoRA, estimate_memory, load_packed
from lightning_peft.storage.registry import released_methods
from tests.helpers.released import RELEASED, save_state, write, write_case

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write("fp8", tmp_path)[0]


def load(folder: Path) -> Any:
    return load_packed(AutoModelForCausalLM, folder, dtype=torch.float32)


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of one layer; None removes one."""
    state = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value is None:
            del state[f"{LAYER}.{name}"]
        else:
            state[f"{LAYER}.{name}"] = value
    save_state(folder, state)


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))


def test_a_class_of_its_own(folder: Path) -> None:
    """The class may be any with `from_pretrained`; its own errors are its own."""
    with pytest.raises(Exception, match=r"(?i)config"):
        load_packed(LlamaForCausalLM, folder.parent / "nowhere")


@pytest.mark.parametrize("name", ["weight", "weight_scale_inv"])
def test_missing_tensors(name: str, folder: Path) -> None:
    change(folder, **{name: None})
    with pytest.raises(ValueError, match=rf"1 difference; .*\n  {LAYER}.{name}: missing"):
        load(folder)


def test_missing_layers(folder: Path) -> None:
    change(folder, weight=None, weight_scale_inv=None)
    with pytest.raises(ValueError, match=r"expected the tensors .* shards are missing"):
        load(folder)


def test_misshapen_scales(folder: Path) -> None:
    change(folder, weight_scale_inv=torch.ones(3, 3))
    with pytest.raises(
        ValueError, match=r"weight_scale_inv: expected shape \[2, 2\], got \[3, 3\]"
    ):
        load(folder)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_damaged_scales(bad: float, folder: Path) -> None:
    change(folder, weight_scale_inv=torch.tensor([[1.0, bad], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=rf"'{LAYER}': fp8 .*got 1 of 4 that are not, the first"):
        load(folder)


def test_nan_codes(folder: Path) -> None:
    codes = load_file(folder / "model.safetensors")[f"{LAYER}.weight"]
    codes.view(torch.uint8)[0, 0] = 0xFF
    change(folder, weight=codes)
    with pytest.raises(ValueError, match="expected codes of numbers, got 1 NaN"):
        load(folder)


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected whole safetensors files, got one"):
        load(folder)


def test_missing_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {f"{LAYER}.weight": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"expected \['model-00002.safetensors'\]"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "new"}, r"expected quant_method in \[.*'fp8'.*\], got 'new'"),
        ({"scale_fmt": "int4"}, r"scale_fmt: expected one of \['float', 'ue8m0'\], got 'int4'"),
        ({"expert_dtype": "fp2"}, "expert_dtype: expected one of .*got 'fp2'"),
        ({"activation_scheme": "odd"}, "activation_scheme: expected one of .*got 'odd'"),
    ],
)
def test_unknown_settings(settings: dict[str, Any], message: str, folder: Path) -> None:
    configure(folder, **settings)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got a dense one; load it with AutoModelForCausalLM"):
        load(write("fp8", tmp_path)[1])


def test_no_directory() -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a local directory with config\.json"):
        load(Path("org/model"))


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lightning_peft.hf.load_packed")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="found none; pip install transformers"):
        load(folder)


def test_compressed_tensors_with_settings_that_are_not_known(tmp_path: Path) -> None:
    folder = write("int4", tmp_path)[0]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    configure(folder, **config)
    with pytest.raises(ValueError, match=r"actorder: expected one of .*got 'group'"):
        load(folder)


def make(name: str, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of the format, and its quantization_config."""
    folder = write(name, tmp_path)[0]
    return folder, json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_modelopt_settings_in_a_file_of_their_own(
    algorithm: str, nested: bool, tmp_path: Path
) -> None:
    """Model Optimizer writes hf_quant_config.json; in config.json it may be one level down."""
    folder, _ = make("modelopt nvfp4", tmp_path)
    want = load(folder).state_dict()
    planned = estimate_memory(folder, LoRA(r=2)).sizes
    path = folder / "config.json"
    config = json.loads(path.read_text())
    told = {"quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}}
    if nested:
        config["quantization_config"] = {"quant_method": "modelopt", **told}
    else:
        del config["quantization_config"]
        (folder / "hf_quant_config.json").write_text(json.dumps(told))
    path.write_text(json.dumps(config))
    assert estimate_memory(folder, LoRA(r=2)).sizes == planned
    assert estimate_memory(path, LoRA(r=2)).sizes == planned
    got = load(folder)
    assert all(torch.equal(t, want[key]) for key, t in got.state_dict().items())
    got.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").state_dict()
    assert all(torch.equal(t, want[key]) for key, t in again.items())


def test_a_damaged_file_of_settings(tmp_path: Path) -> None:
    """`load_packed` and the planner name the file; read as dense, codes would be weights."""
    folder, _ = make("modelopt nvfp4", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text('{"quantization": ')
    for call in (load, lambda where: estimate_memory(where, LoRA(r=2))):
        with pytest.raises(ValueError, match=r"hf_quant_config\.json: expected JSON, got"):
            call(folder)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("modelopt nvfp4", {"quant_algo": "NVFP4_AWQ"}, "{'quant_algo': 'NVFP4_AWQ'}"),
        ("gptq", {"checkpoint_format": "marlin"}, "{'checkpoint_format': 'marlin'}"),
        ("int4", {"config_groups": {}}, "'config_groups': {}"),
    ],
)
def test_kinds_that_no_storage_reads(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The setting is named, not the `quant_method`, which is known."""
    folder, _ = make(name, tmp_path)
    configure(folder, **settings)
    with pytest.raises(ValueError, match=rf"a kind of .* that a storage reads, got .*{message}"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("int8_weight_only", "expected the fields of a configuration of torchao, got 'int8_w"),
        ({"default": {"_type": "Int4WeightOnlyConfig"}}, "got 'Int4WeightOnlyConfig', whose"),
        (
            {"default": {"_type": "Int8WeightOnlyConfig",
                         "_data": {"granularity": {"_type": "PerAxis"}}}},
            "granularity: expected a scale per row, group of columns or matrix, got .*PerAxis",
        ),
        (
            {"default": {"_type": "Float8WeightOnlyConfig",
                         "_data": {"weight_dtype": {"_data": "float8_e5m2"}}}},
            "weight_dtype: expected float8_e4m3fn, got float8_e5m2",
        ),
    ],
)  # fmt: skip
def test_torchao_with_settings_that_are_not_known(kind: Any, message: str, tmp_path: Path) -> None:
    folder, _ = make("torchao int8", tmp_path)
    configure(folder, quant_type=kind)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_packed_embeddings_of_torchao(tmp_path: Path) -> None:
    folder, _ = make("torchao int8", tmp_path)
    configure(folder, include_input_output_embeddings=True)
    with pytest.raises(ValueError, match="expected dense embeddings and a dense head, got packed"):
        load(folder)


@pytest.mark.parametrize("name", ["torchao int8", "fp8"])
def test_a_packed_layer_that_the_config_leaves_out(name: str, tmp_path: Path) -> None:
    """Its codes would be read as weights."""
    folder, _ = make(name, tmp_path)
    configure(folder, modules_to_not_convert=["up_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"expected dense tensors .* packed ones for .*up_proj"):
        load(folder)


def test_codes_of_single_experts_are_no_weights(tmp_path: Path) -> None:
    """torchao packed each expert, as older versions of transformers had them.

    The model joins the experts into one dense parameter.
    """
    case = RELEASED["torchao int8"]
    folder = write_case(replace(case, config=RELEASED["fp8 experts"].config), tmp_path)[0]
    configure(folder, modules_to_not_convert=["mlp.gate", "lm_head"])
    with pytest.raises(ValueError, match=r"packed ones for model\.layers\.0\.mlp\.experts, "):
        load(folder)


def test_a_packed_layer_of_another_shape_than_its_weight(tmp_path: Path) -> None:
    """It is named before transformers compares the shapes."""
    folder, _ = make("gptq", tmp_path)
    configure(folder, dynamic={r"-:.*up_proj": {}})
    with pytest.raises(ValueError, match=r"expected dense tensors .* packed ones for .*up_proj"):
        load(folder)


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq desc_act"])
def test_one_group_per_row(name: str, tmp_path: Path) -> None:
    """``group_size`` -1, or inputs that one group covers."""
    case = RELEASED[name]
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    packed, dense = write_case(replace(case, config=lambda: config), tmp_path)
    model, plain = load(packed), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "again")
    before = load_file(packed / "model.safetensors")
    after = load_file(tmp_path / "again/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("damage", ["order", "infinite", "bits", "truncated"])
def test_damaged_gptq(damage: str, tmp_path: Path) -> None:
    folder, _ = make("gptq desc_act", tmp_path)
    state = load_file(folder / "model.safetensors")
    if damage == "bits":
        configure(folder, bits=8)
    elif damage == "order":
        change(folder, g_idx=torch.zeros_like(state[f"{LAYER}.g_idx"]))
    elif damage == "infinite":
        scales = state[f"{LAYER}.scales"].clone()
        scales[0, 3] = math.inf
        change(folder, scales=scales)
    else:
        change(folder, qzeros=state[f"{LAYER}.qzeros"][:1])
    message = {
        "order": r"g_idx: expected 2 groups of 32 inputs each, got groups 0 to 0",
        "infinite": r"scales: expected finite scales, got 1 of",
        "bits": r"expected 4 bits, got 8",
        "truncated": r"weight_zeros: expected shape \[2, 12\], got \[1, 12\]",
    }[damage]
    with pytest.raises(ValueError, match=message):
        load(folder)


#: What becomes of each quantizer of transformers. "read" is read packed by `load_packed`; "adopted"
#: layers are taken over as another library loads them; all others are refused by name.
QUANTIZERS = {
    "fp8": "read",
    "mxfp8": "read",
    "mxfp4": "read",
    "compressed-tensors": "read",
    "awq": "read",
    "modelopt": "read",
    "gptq": "read",
    "torchao": "read",
    "bitsandbytes_4bit": "adopted",
    "bitsandbytes_8bit": "adopted",
}


@pytest.mark.parametrize("method", sorted({*AUTO_QUANTIZER_MAPPING} - {"lightning_peft"}))
def test_every_quantizer_of_transformers(method: str, folder: Path) -> None:
    fate = QUANTIZERS.get(method, "refused")
    assert (method in released_methods()) == (fate == "read")
    if fate == "refused":
        configure(folder, quant_method=method)
        with pytest.raises(ValueError, match=rf"expected quant_method in .*, got '{method}'"):
            load(folder)
