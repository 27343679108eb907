"""4-bit quantisation: bytes and values against bitsandbytes and against the reference."""

import pytest
import torch
from lightning_peft_kernels.codebooks import four_bit
from lightning_peft_kernels.nf4.ops import (
    Packed4bit,
    dequantize_4bit,
    dequantize_4bit_reference,
    quantize_4bit,
    quantize_4bit_reference,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 64), (33, 112), (7, 13), (128, 65), (50, 96), (3, 5), (1, 1), (16, 1024)]
SPECIAL = {
    "zero": torch.zeros(64, 64),
    "constant": torch.full((64, 64), 0.3),
    "huge": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 3e37,
    "tiny": torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 1e-38,
    "denormal": torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) * 1e-40,
    "smallest": torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) * 1e-44,
    "one zero block": torch.cat([torch.zeros(1, 64), torch.ones(3, 64)]),
}


def bitsandbytes_bytes(W: torch.Tensor, kind: str, block_size: int, nested: bool) -> Packed4bit:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(
        W, blocksize=block_size, compress_statistics=nested, quant_type=kind
    )
    if not nested:
        return Packed4bit(packed.view(-1), state.absmax, None, None)
    return Packed4bit(packed.view(-1), state.absmax, state.state2.absmax, state.offset.reshape(1))


def assert_same_bytes(got: Packed4bit, want: Packed4bit) -> None:
    for name, a, b in zip(Packed4bit._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert torch.equal(a.view(-1), b.view(-1)), f"{name}: {int((a != b).sum())} differ"


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_equal_bitsandbytes(shape, block_size, kind, nested):
    for dtype in FLOATS:
        for scale in (1.0, 0.02):
            W = (torch.randn(shape) * scale).to(dtype)
            got = quantize_4bit(W, kind=kind, block_size=block_size, double_quant=nested)
            assert_same_bytes(got, bitsandbytes_bytes(W, kind, block_size, nested))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values_equal_bitsandbytes(name, kind):
    W = SPECIAL[name]
    for nested in (
        (True, False) if name != "huge" else (False,)
    ):  # the mean of huge scales overflows
        got = quantize_4bit(W, kind=kind, double_quant=nested)
        assert_same_bytes(got, bitsandbytes_bytes(W, kind, 64, nested))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fast_path_equals_reference(shape, kind):
    W = torch.randn(shape)
    for nested in (True, False):
        q = quantize_4bit(W, kind=kind, double_quant=nested)
        assert_same_bytes(q, quantize_4bit_reference(W, kind=kind, double_quant=nested))
        for dtype in FLOATS:
            got = dequantize_4bit(q, shape, dtype, kind=kind)
            assert torch.equal(got, dequantize_4bit_reference(q, shape, dtype, kind=kind)), dtype


@pytest.mark.parametrize("absmax", [1.0, 0.3, 3e38, 1e-37])
def test_values_beside_decision_points_equal_reference(absmax):
    """Where the lookup by cell has no answer: neighbours of decision points and of cells' edges."""
    points = four_bit.midpoints("nf4")
    edges = (torch.randint(-(1 << 15), 1 << 15, (255,)) + 0.5) / (1 << 14)
    centres = torch.cat([points, edges[edges.abs() < 1.0], torch.tensor([0.0, 1.0])])
    near = [centres]
    for direction in (-2.0, 2.0):
        t = centres
        for _ in range(4):
            t = torch.nextafter(t, torch.full_like(t, direction))
            near.append(t.clamp(-1.0, 1.0))
    values = torch.cat([*near, *(-t for t in near)]) * absmax
    rows = torch.nn.functional.pad(values, (0, -values.numel() % 31)).view(-1, 31)
    W = torch.nn.functional.pad(rows, (0, 1), value=absmax)  # each block of 32 holds its absmax
    assert_same_bytes(
        quantize_4bit(W, block_size=32, double_quant=False),
        quantize_4bit_reference(W, block_size=32, double_quant=False),
    )


def test_values_equal_bitsandbytes_where_its_cpu_code_is_right():
    functional = pytest.importorskip("bitsandbytes").functional
    W = torch.randn(64, 128)
    packed, state = functional.quantize_4bit(W, compress_statistics=True, quant_type="nf4")
    assert torch.equal(
        dequantize_4bit(quantize_4bit(W), W.shape, W.dtype),
        functional.dequantize_4bit(packed, state),
    )


def test_the_pair_table_equals_the_native_routine(monkeypatch):
    import lightning_peft_kernels.nf4.cpu as module

    W = torch.randn(37, 128)
    q = quantize_4bit(W)
    native = dequantize_4bit(q, W.shape, torch.bfloat16)
    monkeypatch.setattr(module, "native_routine", lambda name, arguments: None)
    assert torch.equal(dequantize_4bit(q, W.shape, torch.bfloat16), native)


def test_error_is_within_half_a_step():
    """An oracle apart from tables: the widest gap of NF4 is 0.304, so half of it bounds the error
    of a block.
    """
    W = torch.randn(128, 64)
    got = dequantize_4bit(quantize_4bit(W, double_quant=False), W.shape, torch.float32)
    bound = 0.5 * 0.3039 * W.abs().amax(dim=1, keepdim=True)
    assert ((got - W).abs() <= bound).all()


def test_out_is_written():
    W = torch.randn(8, 64)
    q, out = quantize_4bit(W), torch.full((8, 64), torch.nan)
    assert dequantize_4bit(q, W.shape, torch.float32, out=out) is out
    assert torch.equal(out, dequantize_4bit(q, W.shape, torch.float32))
    with pytest.raises(ValueError, match=r"got \(64, 8\)"):
        dequantize_4bit(q, W.shape, torch.float32, out=torch.empty(64, 8))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [257, 1500])  # one thread's share, and three of them
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bytes_do_not_depend_on_threads_or_modes(threads, rows, mode):
    W = torch.randn(rows, 300)
    want = quantize_4bit_reference(W)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mode():
            assert_same_bytes(quantize_4bit(W), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("nested", [True, False])
def test_opcheck(nested):
    W = torch.randn(6, 64)
    torch.library.opcheck(torch.ops.lightning_peft.quantize_4bit.default, (W, "nf4", 64, nested))
    q = quantize_4bit(W, double_quant=nested)
    torch.library.opcheck(
        torch.ops.lightning_peft.dequantize_4bit.default, (*q, [6, 64], torch.float32, "nf4", 64)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_4bit(torch.tensor([1.0, torch.nan])), "NaN or infinity"),
        (lambda: quantize_4bit(torch.tensor([1.0, -torch.inf])), "NaN or infinity"),
        (lambda: quantize_4bit(torch.zeros(4, dtype=torch.uint8)), "torch.uint8"),
        (lambda: quantize_4bit(torch.ones(4), kind="nf5"), "'nf5'"),
        (lambda: quantize_4bit(torch.ones(4), block_size=48), "48"),
        (lambda: dequantize_4bit(quantize_4bit(torch.ones(64)), (65,), torch.float32), "33 bytes"),
    ],
)
def test_refusals_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tables_do_not_depend_on_the_default_dtype():
    """`Trainer(precision="bf16-true")` runs a step under another default dtype, and tables are made
    when they are first wanted.
    """
    from lightning_peft_kernels.codebooks import eight_bit
    from lightning_peft_kernels.nf4 import cpu as nf4_cpu

    tables = [
        (four_bit.code, "nf4"), (four_bit.code, "fp4"), (four_bit.midpoints, "nf4"),
        (four_bit.nf4_cells,), (nf4_cpu._pairs, "nf4"), (eight_bit.coarse_cells,),
        (eight_bit.dynamic_map, True), (eight_bit.dynamic_map, False),
        (eight_bit.decision_points, True), (eight_bit.code_cells, True),
    ]  # fmt: skip
    W = torch.randn(64, 64)

    def made() -> list[torch.Tensor]:
        for table, *_ in tables:
            table.cache_clear()
        found = [table(*arguments) for table, *arguments in tables]
        q = quantize_4bit(W)
        flat = [t for f in found for t in (f if isinstance(f, tuple) else (f,))]
        return [*flat, *q, dequantize_4bit(q, W.shape, torch.float32)]

    want = made()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = made()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
