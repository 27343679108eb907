"""Checkpoints packed, and dequantised, by the libraries that release them.

Run where a library is installed: ``pytest -m slow``. No test needs a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lightning_peft as lp
from tests.helpers.compare import assert_close
from tests.helpers.released import RELEASED, Released, State, llama, write_case

pytestmark = pytest.mark.slow

#: (key, weight) → (tensors of the file, the weight as the library reads them).
Packer = Callable[[str, Tensor], tuple[State, Tensor]]


def check(quantization: dict[str, Any], packer: Packer, folder: Path, config: Any = llama) -> None:
    """`load_packed` computes what the library's own dequantised weights compute."""
    values: State = {}

    def pack(key: str, W: Tensor) -> State:
        packed, values[key] = packer(key, W)
        return packed

    def dequantised(packed: State) -> State:
        return values | {k: t for k, t in packed.items() if k in plain}

    plain = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    plain += tuple(
        f"model.layers.{i}.{n}.weight" for i in range(2)
        for n in ("input_layernorm", "post_attention_layernorm")
    )  # fmt: skip
    case = Released(config, quantization, pack, dequantised, "")
    packed, dense = write_case(case, folder)
    model = lp.load_packed(AutoModelForCausalLM, packed, dtype=torch.float32)
    compare(model, AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))


def compare(model: Any, oracle: Any) -> None:
    """Outputs and gradients of adapters."""
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    for m in (model, oracle):
        torch.manual_seed(0)
        lp.attach(m.train(), lp.LoRA(r=2, target_modules="all-linear"))
        m(ids, labels=ids).loss.backward()
    with torch.no_grad():
        assert_close("output", model(ids).logits, oracle(ids).logits, floor=1e-6)
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    for key, grad in trained.items():
        assert_close(key, grad, oracle.get_parameter(key).grad, floor=2e-6)


# ---- compressed-tensors

COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {}),
    "int4 zero points": ("int4", {"symmetric": False}),
    "int8": ("int8", {}),
    "fp8 rows": ("fp8 rows", {}),
    "nvfp4": ("nvfp4", {}),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(name: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    listed, changes = COMPRESSED[name]
    released: dict[str, Any] = dict(RELEASED[listed].quantization)
    (group,) = released["config_groups"].values()
    settings = {**group["weights"], **changes}
    if listed == "nvfp4":
        settings |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    arguments = quantization.QuantizationArgs(**settings)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = compressors.BaseCompressor.get_value_from_registry(released["format"])
    released["config_groups"] = {"group_0": {**group, "weights": {**group["weights"], **changes}}}

    def packer(key: str, W: Tensor) -> tuple[State, Tensor]:
        groups = W.unflatten(-1, (-1, settings.get("group_size") or W.shape[-1]))
        low, high = groups.amin(-1), groups.amax(-1)
        state: State = {"weight": W}
        outer = None
        if listed == "nvfp4":
            outer = generate_gparam(W.amin().reshape(1), W.amax().reshape(1))
            state["weight_global_scale"] = outer
        scale, zero = calculate_qparams(low, high, arguments, global_scale=outer)
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(state, scheme)
        if listed == "nvfp4":  # its own `decompress` rounds to bf16
            codes = unpack_fp4_from_uint8(packed["weight_packed"], *W.shape, dtype=torch.float32)
            s = packed["weight_scale"].float()
            dense = dequantize(codes, s, args=arguments, global_scale=outer, dtype=torch.float32)
        else:
            dense = compressor.decompress(dict(packed), scheme)["weight"]
        prefix = key.removesuffix("weight")
        return {f"{prefix}{k}": t for k, t in packed.items()}, dense.float()

    check(released, packer, tmp_path)


# ---- GPTQ and AWQ


def zero_point_parameters(W: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups]."""
    groups = W.unflatten(-1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    return scale, (-low / scale).round().clamp(1, 15)


@pytest.mark.parametrize("desc_act", [False, True])
def test_gptqmodel(desc_act: bool, tmp_path: Path) -> None:
    made = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")

    def packer(key: str, W: Tensor) -> tuple[State, Tensor]:
        N, K = W.shape
        index = torch.arange(K, dtype=torch.int32) // 32
        if desc_act:
            index = index[torch.randperm(K)]
        order = index.argsort(stable=True)
        scale, zero = zero_point_parameters(W[:, order], 32)
        layer = made.TorchLinear(
            bits=4, group_size=32, desc_act=desc_act, sym=False, in_features=K, out_features=N,
            bias=False, register_buffers=True, pack_dtype=torch.int32,
        )  # fmt: skip
        linear = nn.Linear(K, N, bias=False)
        linear.weight.data = W.half()
        layer.pack_original(linear, scale, zero, g_idx=index)  # `pack` compiles C++
        prefix = key.removesuffix("weight")
        names = ("qweight", "qzeros", "scales", "g_idx")
        packed = {f"{prefix}{n}": getattr(layer, n).clone() for n in names}
        layer.scales = layer.scales.float()  # else it dequantises in fp16
        with torch.compiler.set_stance("force_eager"):
            layer.post_init()
            dense = layer.dequantize_weight().float().mT
        return packed, dense

    # The layer holds and packs z; its files say so by their format.
    settings = {"bits": 4, "group_size": 32, "desc_act": desc_act, "checkpoint_format": "gptq_v2"}
    check({"quant_method": "gptq", **settings}, packer, tmp_path)


def test_autoawq(tmp_path: Path) -> None:
    made = pytest.importorskip("awq.modules.linear.gemm")
    from awq.utils.packing_utils import dequantize_gemm

    def packer(key: str, W: Tensor) -> tuple[State, Tensor]:
        N, K = W.shape
        scale, zero = zero_point_parameters(W, 32)
        linear = nn.Linear(K, N, bias=False)
        linear.weight.data = W.clone()
        layer = made.WQLinear_GEMM.from_linear(
            linear, 4, 32, scales=scale.mT.contiguous(), zeros=zero.mT.contiguous()
        )
        dense = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, 32).mT
        prefix = key.removesuffix("weight")
        names = ("qweight", "qzeros", "scales")
        return {f"{prefix}{n}": getattr(layer, n) for n in names}, dense.float()

    check(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        packer, tmp_path,
    )  # fmt: skip


# ---- Model Optimizer


@pytest.mark.parametrize("name", ["FP8", "NVFP4"])
def test_modelopt(name: str, tmp_path: Path) -> None:
    """A directory of `export_hf_checkpoint`, against the weights that the library dequantises."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    oracle: Any = AutoModelForCausalLM.from_config(llama(), dtype=torch.float32)
    made = copy.deepcopy(oracle)
    made.config.architectures = [type(oracle).__name__]
    quantization.quantize(
        made, getattr(quantization, f"{name}_DEFAULT_CFG"), lambda model: model(ids)
    )
    export_hf_checkpoint(made, dtype=torch.float32, export_dir=tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    for key, t in files.items():
        scale = files.get(f"{key}_scale")
        if scale is None or key.endswith("_scale"):
            continue
        if name == "FP8":
            dense = t.float() * scale
        else:
            plain = oracle.get_parameter(key)
            packed = NVFP4QTensor(plain.shape, plain.dtype, t)
            dense = packed.dequantize(
                scale=scale, double_scale=files[f"{key}_scale_2"], block_sizes={-1: 16}
            )
        oracle.get_parameter(key).data.copy_(dense)
    model: Any = lp.load_packed(AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    codes = model.model.layers[0].mlp.up_proj.get_parameter("weight")
    assert codes.dtype == torch.uint8
    compare(model, oracle)
