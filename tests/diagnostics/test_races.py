"""Races between the ways to compute a product: their process, their file, and who follows them."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning_peft_kernels import races, verdicts
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.experts.selection import select_experts
from lightning_peft_kernels.launch import FAILURES
from lightning_peft_kernels.lora.selection import select_one_pass
from lightning_peft_kernels.nf4.bf16_cpu import has_bf16_product
from lightning_peft_kernels.nf4.selection import select_group, select_product
from lightning_peft_kernels.races import Race, measured, read_races, store_races, use_races
from lightning_peft_kernels.verdicts import device_key, file_of, verdict_lock

from lightning_peft.__main__ import main
from lightning_peft.diagnostics.model_shapes import ModelShapes, shapes_of
from lightning_peft.diagnostics.race_runner import tune_device
from lightning_peft.diagnostics.race_worker import ALWAYS, RaceRequest, contests, race
from tests.helpers.fake_gpu import GPUS
from tests.helpers.tiny_models import BUILDERS

CPU, BF16 = torch.device("cpu"), torch.bfloat16
WORKER = "tests.helpers.failing_racer"
SHAPE = (4096, 4096)


def product(tokens: int, winner: str, shape: tuple[int, ...] = SHAPE) -> Race:
    return Race("product", "bfloat16", shape, tokens, winner, {winner: 20.0, "dequantize": 31.5})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the user's cache, and what this process knows, out of the tests."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(verdicts, "_hash_of_sources", lambda: "sources")
    use_races(CPU, [])
    yield folder
    use_races(CPU, [])
    races._READ.discard(CPU)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, CPU, GPUS["sm_90"].chip)
    monkeypatch.setattr("lightning_peft_kernels.dispatch.triton_available", lambda: True)


@pytest.mark.usefixtures("hopper")
def test_a_selection_follows_the_race_of_its_shape() -> None:
    use_races(CPU, [product(64, "dequantize"), product(8, "fused")])
    for tokens, want in ((1, "fused"), (8, "fused"), (9, "dequantize"), (64, "dequantize")):
        found = select_product(CPU, BF16, tokens, SHAPE, "auto")
        assert found.backend == want, tokens
        assert f"{tokens} tokens, measured here on cpu, " in found.reason
        assert found.reason.endswith("us")
    # Beyond what was raced, in another shape, dtype, block or under a request, the rule decides.
    for other in (
        select_product(CPU, BF16, 65, SHAPE, "auto"),
        select_product(CPU, BF16, 8, (4096, 1024), "auto"),
        select_product(CPU, torch.float16, 8, SHAPE, "auto"),
        select_product(CPU, BF16, 8, SHAPE, "auto", 128),
        select_product(CPU, BF16, 8, SHAPE, "torch"),
    ):
        assert "measured here" not in other.reason


@pytest.mark.usefixtures("hopper")
def test_a_winner_that_failed_since_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    use_races(CPU, [product(4, "fused")])
    monkeypatch.setitem(FAILURES, ("nf4_small_batch", "bfloat16, few rows", CPU), "PTXASError")
    assert "PTXASError" in select_product(CPU, BF16, 1, SHAPE, "auto").reason


@pytest.mark.usefixtures("hopper")
def test_every_question_is_asked() -> None:
    ways = {"group": "apart", "rank_gradients": "torch", "experts": "dequantize"}
    shapes = {"group": (4096, 1024, 4096), "rank_gradients": (16,), "experts": (256, 128)}
    use_races(
        CPU,
        [Race(q, "bfloat16", shapes[q], ALWAYS, way, {way: 1.0}) for q, way in ways.items()],  # type: ignore[arg-type]
    )
    found = (
        select_group(CPU, BF16, 2048, [(4096, 4096), (1024, 4096)]),
        select_one_pass(CPU, BF16, 8),
        select_experts(CPU, BF16, 64, 8, (256, 128)),
    )
    assert [decision.backend for decision in found] == list(ways.values())
    assert all("measured here" in decision.reason for decision in found)
    use_races(CPU, [])
    again = (
        select_group(CPU, BF16, 2048, [(4096, 4096), (1024, 4096)]),
        select_one_pass(CPU, BF16, 8),
        select_experts(CPU, BF16, 64, 8, (256, 128)),
    )
    assert [decision.backend for decision in again] == ["grouped", "triton", "fused"]


def test_a_way_that_ends_its_process_is_left_out() -> None:
    shapes = ModelShapes(linear=((32, 32), (64, 32), (128, 32)))
    found, why = tune_device(CPU, shapes, worker=WORKER)
    assert why == ""
    assert [(r.shape, set(r.microseconds)) for r in found] == [
        ((32, 32), {"dequantize", "fused", "bitsandbytes"}),
        ((64, 32), {"dequantize", "bitsandbytes"}),
        ((128, 32), {"dequantize", "bitsandbytes"}),
    ]
    assert read_races(device_key(CPU)) == found
    assert measured("product", CPU, BF16, (64, 32))[0][1] == "bitsandbytes"


def test_a_process_that_does_not_start_changes_nothing() -> None:
    with pytest.raises(RuntimeError, match="the device is busy"):
        tune_device(CPU, ModelShapes(linear=((1, 32),)), worker=WORKER)
    assert not file_of(device_key(CPU), "races").exists()


def test_races_of_other_shapes_stay_and_are_found_by_another_process() -> None:
    key = device_key(CPU)
    store_races(key, [product(8, "fused"), product(64, "fused")])
    store_races(key, [product(8, "dequantize"), product(8, "fused", (32, 64))])
    kept = {(r.shape, r.tokens): r.winner for r in read_races(key)}
    assert kept == {(SHAPE, 8): "dequantize", (SHAPE, 64): "fused", ((32, 64), 8): "fused"}
    races._READ.discard(CPU)  # as a new process
    assert [w[:2] for w in measured("product", CPU, BF16, SHAPE)] == [
        (8, "dequantize"),
        (64, "fused"),
    ]


@pytest.mark.parametrize(
    "text", ["{", '{"key": {}, "races": []}', '{"races": 1}', '{"key": null, "races": [{}]}']
)
def test_a_file_that_cannot_be_used_counts_as_absent(text: str) -> None:
    key = device_key(CPU)
    file = file_of(key, "races")
    file.parent.mkdir()
    file.write_text(text)
    races._READ.discard(CPU)
    with pytest.warns(UserWarning, match=r"expected races on kernels.*check"):
        assert measured("product", CPU, BF16, SHAPE) == ()
    assert store_races(key, [product(8, "fused")]) == ""  # warned above
    assert [r.winner for r in read_races(key)] == ["fused"]


@pytest.mark.parametrize("change", [{"winner": "quickest"}, {"dtype": "float9"}, {"tokens": None}])
def test_an_entry_that_cannot_be_used_makes_the_file_unusable(change: dict[str, object]) -> None:
    key = device_key(CPU)
    store_races(key, [product(8, "fused")])
    stored = json.loads(file_of(key, "races").read_text())
    entry = stored["races"][0]
    for name, value in change.items():
        if value is None:
            del entry[name]
        else:
            entry[name] = value
    file_of(key, "races").write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match=next(iter(change))):
        assert read_races(key) == []


def test_a_folder_that_cannot_be_written_is_said_and_the_races_hold(cache: Path) -> None:
    cache.write_text("a file")
    found, why = tune_device(CPU, ModelShapes(linear=((32, 32),)), worker=WORKER)
    assert f"not written: expected a folder, got the file {cache}" in why
    assert measured("product", CPU, BF16, (32, 32))[0][1] == found[0].winner


def test_two_at_once_lose_nothing() -> None:
    key, both = device_key(CPU), threading.Barrier(2)

    def store(size: int) -> None:
        both.wait()
        for i in range(10):
            with verdict_lock(key):
                store_races(key, [product(8, "fused", (size, i + 1))])

    threads = [threading.Thread(target=store, args=(size,)) for size in (32, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_races(key)) == 20


def test_shapes_of_a_model() -> None:
    with torch.device("meta"):
        model = BUILDERS["llama"]()
    found = shapes_of(model)
    widths = {K for _, K in found.linear}
    assert found.linear
    assert all(group[-1] in widths for group in found.groups)
    assert len(found.groups) == 2  # q, k, v and gate, up
    N, K, tokens = found.for_checks(7)[0]
    assert (-(-found.linear[0][0] // 16) * 16, -(-found.linear[0][1] // 64) * 64) == (N, K)
    assert tokens == 7


@pytest.mark.usefixtures("hopper")
def test_contests_of_a_chip() -> None:
    request = RaceRequest(
        "cpu", "bfloat16", ((128, 64),), ((128, 64, 64),), ((4, 64, 64),), tokens=256
    )
    found = list(contests(request))
    assert {c.question for c in found} == {"product", "group", "experts", "rank_gradients"}
    ways = {c.tokens: c.ways for c in found if c.question == "product"}
    assert ways[1] == ways[8] == ("dequantize", "fused", "pairs")
    assert ways[16] == ways[64] == ("dequantize", "fused")
    assert 128 not in ways  # one way
    assert len({c.name for c in found}) == len(found)


def test_a_way_with_wrong_numbers_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_bf16_product((64, 128), "nf4", 64):
        pytest.skip("no AVX512-BF16 or bitsandbytes")
    request = RaceRequest("cpu", "bfloat16", ((64, 128),), repeats=2, tokens=1)
    (right,) = [found for _, found in race(request) if isinstance(found, Race)]
    assert set(right.microseconds) == {"dequantize", "bf16"}
    from lightning_peft_kernels.nf4 import generation

    product = generation.multiply_bf16
    monkeypatch.setattr(generation, "multiply_bf16", lambda *given: product(*given) * 2)
    (wrong,) = [found for _, found in race(request) if isinstance(found, Race)]
    assert set(wrong.microseconds) == {"dequantize"}
    assert wrong.winner == "dequantize"


@pytest.mark.slow
def test_the_command_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() or not has_bf16_product((64, 128), "nf4", 64):
        pytest.skip("needs a CPU with AVX512-BF16 and no CUDA device")
    pytest.importorskip("triton")
    given = ["check", "--short", "--ops", "output_scale", "--tune", "--shape", "64", "128", "8"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "no CUDA device: races on the CPU" in printed
    assert "up to 1 tokens" in printed
    found = select_product(CPU, BF16, 1, (64, 128), "auto", exact=False)
    assert "measured here on cpu" in found.reason
