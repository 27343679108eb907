"""Block-scaled weights against a loop over single weights, written from the formats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from lightning_peft_kernels.block_scaled import decode
from lightning_peft_kernels.block_scaled.decode import decode_blocks, decode_blocks_reference
from lightning_peft_kernels.block_scaled.encode import encode_blocks
from lightning_peft_kernels.block_scaled.layout import BlockLayout, BlockTensors
from lightning_peft_kernels.block_scaled.linear import block_linear
from lightning_peft_kernels.experts.grouped_linear import block_grouped_linear
from lightning_peft_kernels.experts.groups import Groups
from torch import Tensor

from tests.helpers.compare import assert_close, assert_same_bits

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8 = BlockLayout("e4m3", 128, 128)
MX = BlockLayout("e2m1", 1, 32, 1, "e8m0")


def e4m3(code: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def value(element: str, code: int) -> float:
    if element == "e4m3":
        return e4m3(code)
    if element == "int8":
        return code - 256 if code > 127 else code
    if element == "e2m1":
        return FP4[code & 7] * (-1 if code & 8 else 1)
    return code - 8 if element == "int4" else code


def by_hand(q: BlockTensors, layout: BlockLayout, N: int, K: int) -> Tensor:
    rows, columns = layout.rows or N // layout.halves, layout.columns or K
    half = N // layout.halves
    per_half = math.ceil(half / rows)
    scales = q.scales.view(layout.scale_dtype).float()
    W = torch.empty(N, K)
    for n in range(N):
        block = n // half * per_half + n % half // rows
        for k in range(K):
            if layout.codes_per_byte == 2:
                code = (int(q.codes[n, k // 2]) >> (4 * (k % 2))) & 15
            else:
                code = int(q.codes[n, k])
            zero = 0 if q.zeros is None else int(q.zeros[block, k // columns])
            scale = scales[block, k // columns]
            W[n, k] = torch.tensor(float(value(layout.element, code) - zero)) * scale
    return W


LAYOUTS = [
    FP8,
    BlockLayout("e4m3", 128, 128, 2),
    BlockLayout("e4m3", 16, 8, 2, "e8m0"),
    BlockLayout("e4m3", 0, 0),
    BlockLayout("int8", 1, 0, 1, "bfloat16"),
    MX,
    BlockLayout("int4", 1, 32, 1, "bfloat16"),
    BlockLayout("uint4", 1, 32, 1, "float16"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (18, 96), (130, 64)])
def test_decoded_by_hand(layout: BlockLayout, shape: tuple[int, int]) -> None:
    if shape[0] % layout.halves:
        pytest.skip("no halves")
    q = encode_blocks(torch.randn(shape), layout)
    want = by_hand(q, layout, *shape)
    assert_same_bits("chunks", decode_blocks(q, shape, layout, torch.float32), want)
    assert_same_bits("plain", decode_blocks_reference(q, shape, layout, torch.float32), want)
    half = decode_blocks(q, shape, layout, torch.bfloat16)
    assert_same_bits("rounded once", half, want.bfloat16())


@pytest.mark.parametrize("shape", [(192, 320), (576, 7), (7, 576), (1, 1), (300, 129)])
def test_partial_blocks(shape: tuple[int, int]) -> None:
    """Both axes; the whole weight in one chunk and in several gives the plain result."""
    for halves in (1, 2) if shape[0] % 2 == 0 else (1,):
        layout = BlockLayout("e4m3", 128, 128, halves)
        q = encode_blocks(torch.randn(shape), layout)
        got = decode_blocks(q, shape, layout, torch.float32)
        assert_same_bits("W", got, decode_blocks_reference(q, shape, layout, torch.float32))


def test_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    numbers = torch.where((codes & 127) == 127, 0, codes)
    q = BlockTensors(numbers, torch.tensor([[2.0]]).view(torch.uint8))
    got = decode_blocks(q, (2, 128), BlockLayout("e4m3", 0, 0), torch.float32)
    want = torch.tensor([2 * e4m3(int(c)) for c in numbers.view(-1)])
    assert_same_bits("e4m3", got.view(-1), want)
    for byte in (0, 1, 127, 254):
        pairs = torch.arange(256, dtype=torch.uint8).view(8, 32)
        q = BlockTensors(pairs, torch.full((8, 2), byte, dtype=torch.uint8))
        got = decode_blocks(q, (8, 64), MX, torch.float32)
        want = [
            math.ldexp(value("e2m1", (int(b) >> shift) & 15), byte - 127)
            for b in pairs.view(-1)
            for shift in (0, 4)
        ]
        assert_same_bits(f"e2m1 at 2^{byte - 127}", got.view(-1), torch.tensor(want))


@pytest.mark.parametrize("layout", LAYOUTS[:-2], ids=str)
def test_encoding_again_changes_nothing(layout: BlockLayout) -> None:
    shape = (256, 192)
    q = encode_blocks(torch.randn(shape), layout)
    W = decode_blocks(q, shape, layout, torch.float32)
    again = decode_blocks(encode_blocks(W, layout), shape, layout, torch.float32)
    assert_same_bits("W", again, W)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_encoding_error(layout: BlockLayout) -> None:
    """Each weight is within half a step of its block: of the codes' largest gap."""
    W = torch.randn(64, 96)
    q = encode_blocks(W, layout)
    got = decode_blocks(q, (64, 96), layout, torch.float32)
    bound = {"e4m3": 0.05, "int8": 0.015, "e2m1": 0.2, "int4": 0.12, "uint4": 0.1}[layout.element]
    assert (got - W).norm() / W.norm() < bound


@pytest.mark.parametrize("layout", [FP8, MX], ids=str)
def test_linear(layout: BlockLayout) -> None:
    x, bias = torch.randn(3, 5, 96, requires_grad=True), torch.randn(160, requires_grad=True)
    q = encode_blocks(torch.randn(160, 96), layout)
    W = decode_blocks_reference(q, (160, 96), layout, torch.float32)
    y = block_linear(x, q, (160, 96), layout, bias)
    want = torch.nn.functional.linear(x, W, bias)
    assert_close("y", y, want.detach(), floor=1e-6)
    got, wanted = (torch.autograd.grad(t.square().sum(), (x, bias)) for t in (y, want))
    for name, g, w in zip(("dx", "dbias"), got, wanted, strict=True):
        assert_close(name, g, w, floor=1e-6)


def test_double_backward() -> None:
    q = encode_blocks(torch.randn(32, 48).double(), FP8)
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: block_linear(x, q, (32, 48), FP8, None).tanh(), x)
    per_row = torch.func.vmap(lambda row: block_linear(row, q, (32, 48), FP8, None))(x)
    assert_close("vmap", per_row, block_linear(x, q, (32, 48), FP8, None).detach())


@pytest.mark.parametrize("layout", [BlockLayout("e4m3", 128, 128, 2), MX], ids=str)
@pytest.mark.parametrize("on_host", [True, False])
def test_experts(layout: BlockLayout, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts without rows, rows without experts; counts on the host and on the device alone."""
    monkeypatch.setattr(Groups, "on_host", property(lambda self: on_host))
    E, N, K = 5, 192, 64
    q = encode_blocks(torch.randn(E, N, K), layout)
    W = decode_blocks_reference(q, (N, K), layout, torch.float32)
    expert = torch.tensor([0, 0, 2, 2, 2, 4, 5, 5])
    X = torch.randn(8, K, requires_grad=True)
    groups = Groups.sorted(expert, E, has_unassigned_rows=True)
    Y = block_grouped_linear(X, q, (N, K), layout, groups)
    want = torch.stack([W[e] @ x if e < E else torch.zeros(N) for e, x in zip(expert, X)])  # noqa: B905
    assert_close("Y", Y, want.detach(), floor=1e-6)
    (got,), (wanted,) = (torch.autograd.grad(t.square().sum(), X) for t in (Y, want))
    assert_close("dX", got, wanted, floor=1e-6)


def test_layout_as_a_word() -> None:
    for layout in LAYOUTS:
        assert BlockLayout.parse(str(layout)) == layout


@pytest.fixture
def no_tables() -> Iterator[None]:
    """Empties the caches of tables before and after a test."""
    for table in (decode.code_values, decode._pairs):
        table.cache_clear()
    yield
    for table in (decode.code_values, decode._pairs):
        table.cache_clear()


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("mode", ["inference", "meta", "float64"])
def test_tables_do_not_depend_on_the_mode_of_their_first_use(mode: str) -> None:
    with ExitStack() as stack:
        if mode == "float64":
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        elif mode == "meta":
            stack.enter_context(torch.device("meta"))
        else:
            stack.enter_context(torch.inference_mode())
        for element in ("e4m3", "int8", "e2m1", "int4", "uint4"):
            values, pairs = decode.code_values(element), decode._pairs(element, "cpu")
            assert values.dtype == torch.float32
            assert values.device.type == pairs.device.type == "cpu"
            assert not values.is_inference()
            assert not pairs.is_inference()
