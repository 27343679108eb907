"""The check of kernels: its processes, its verdicts and what follows from them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_peft_kernels import verdicts
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.dispatch import Decision, select, triton_available, triton_problem
from lightning_peft_kernels.launch import FAILURES, LaunchError, failure
from lightning_peft_kernels.verdicts import (
    Verdict,
    device_key,
    file_of,
    read_verdicts,
    store_verdicts,
    verdict_lock,
)

from lightning_peft.__main__ import main
from lightning_peft.diagnostics import check_runner, cli
from lightning_peft.diagnostics.check_runner import OPS, check_device, ensure_checked
from lightning_peft.diagnostics.check_worker import Request
from lightning_peft.diagnostics.check_worker import _verdict as verdict_of
from lightning_peft.diagnostics.cli import device_named
from lightning_peft.diagnostics.kernel_checks import kernel_checks
from lightning_peft.diagnostics.model_shapes import ModelShapes
from lightning_peft.diagnostics.pairs import Pair, Shape, bits, close
from lightning_peft.diagnostics.trials import Check, Trial
from lightning_peft.diagnostics.worker_process import run_worker
from tests.helpers.fake_gpu import GPUS
from tests.helpers.tiny_models import BUILDERS

CPU = torch.device("cpu")
WORKER = "tests.helpers.failing_worker"
GOOD = Verdict("scale", "float16", "ok", "", 12.5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's cache, and what this process knows, out of the tests."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(verdicts, "_hash_of_sources", lambda: "sources")
    FAILURES.clear()
    return folder


@pytest.mark.parametrize("short", [True, False])
def test_an_op_that_ends_its_process_is_named_and_the_others_are_checked(short: bool) -> None:
    ops = ("first", "crashes", "wrong", "last")
    told: list[Verdict] = []
    found, why = check_device(CPU, short=short, ops=ops, told=told.append, worker=WORKER)
    assert why == ""
    assert list(found.values()) == told
    outcomes = {f"{op} {configuration}": v.outcome for (op, configuration), v in found.items()}
    want = {
        "first float16": "ok",
        "crashes float16": "crashed",
        "wrong float16": "wrong",
        "last float16": "ok",
    }
    more = {f"{op} float32": "ok" for op in ("first", "wrong", "last")}
    assert outcomes == (want if short else want | more)
    assert found["crashes", "float16"].detail == "illegal memory access"
    assert failure("crashes", "float16", CPU) == "crashed in the check: illegal memory access"
    assert failure("last", "float16", CPU) == ""
    assert read_verdicts(device_key(CPU)) == found


def test_several_ops_at_a_time() -> None:
    ops = ("first", "crashes", "wrong", "last")
    one_by_one, _ = check_device(CPU, ops=ops, worker=WORKER)
    together, _ = check_device(CPU, ops=ops, worker=WORKER, jobs=3)
    assert together == one_by_one
    assert read_verdicts(device_key(CPU)) == one_by_one
    assert main(["check", "--jobs", "0"]) == 2


def test_a_process_that_does_not_start_says_nothing_about_kernels(cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended at its start \(the device is busy\); no kernel"):
        check_device(CPU, ops=("nothing",), worker=WORKER)
    assert not FAILURES
    assert read_verdicts(device_key(CPU)) == {}


def test_verdicts_are_kept_beside_earlier_ones() -> None:
    check_device(CPU, ops=("first",), worker=WORKER)
    check_device(CPU, ops=("wrong",), worker=WORKER)
    assert {op for op, _ in read_verdicts(device_key(CPU))} == {"first", "wrong"}


def test_another_state_of_the_sources_is_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(CPU, ops=("first",), worker=WORKER)
    monkeypatch.setattr(verdicts, "_hash_of_sources", lambda: "changed")
    assert read_verdicts(device_key(CPU)) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"key": {}, "verdicts": []}', '{"verdicts": 1}'])
def test_a_file_that_cannot_be_used_counts_as_absent(text: str) -> None:
    key = device_key(CPU)
    file = file_of(key)
    file.parent.mkdir()
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"expected verdicts on kernels.*check"):
        assert read_verdicts(key) == {}
    assert store_verdicts(key, {("scale", "float16"): GOOD}) == ""
    assert read_verdicts(key) == {("scale", "float16"): GOOD}


def test_a_verdict_that_is_not_known_makes_the_file_unusable() -> None:
    key = device_key(CPU)
    store_verdicts(key, {("scale", "float16"): GOOD})
    file_of(key).write_text(file_of(key).read_text().replace('"ok"', '"splendid"'))
    with pytest.warns(UserWarning, match=r"outcome: expected one of .*got 'splendid'"):
        assert read_verdicts(key) == {}


def test_a_foreign_file_names_its_device() -> None:
    key = device_key(CPU)
    store_verdicts(key, {})
    stored = json.loads(file_of(key).read_text())
    stored["key"]["device"] = "NVIDIA H100"
    file_of(key).write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match="NVIDIA H100"):
        assert read_verdicts(key) == {}


def test_a_folder_that_cannot_be_written_is_said_and_the_verdicts_hold(cache: Path) -> None:
    cache.write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the file may be the user's own: no advice to delete it
        found, why = check_device(CPU, ops=("wrong",), short=True, worker=WORKER)
    assert why == (
        f"{cache}: not written: expected a folder, got the file {cache}; set "
        "LIGHTNING_PEFT_CACHE to a folder"
    )
    assert cache.read_text() == "a file"
    assert found["wrong", "float16"].outcome == "wrong"
    assert failure("wrong", "float16", CPU)
    with verdict_lock(device_key(CPU)):
        pass


@pytest.fixture
def short_form(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Ops of each run of the short form, which finds every kernel right, on a chip."""
    monkeypatch.setitem(CHIPS, CPU, GPUS["sm_90"].chip)
    checks = [c for c in kernel_checks(CPU, Shape(80, 192, 20), interpreted=True) if c.short]
    runs: list[tuple[str, ...]] = []

    def check(request: Request, arrived: Callable[[Verdict], None], *given: object) -> None:
        assert request.short
        runs.append(request.ops)
        for each in checks:
            if each.op in request.ops:
                arrived(Verdict(each.op, each.configuration, "ok", ""))

    monkeypatch.setattr(check_runner, "_check", check)
    return runs


def test_two_at_once_check_once(short_form: list[tuple[str, ...]]) -> None:
    both, found = threading.Barrier(2), []

    def ask() -> None:
        both.wait()
        found.append(ensure_checked(CPU)[0])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(short_form) == 1
    assert found[0] == found[1]
    assert {op for op, _ in found[0]} == set(short_form[0])


def test_what_an_interrupted_check_left_out_is_checked(short_form: list[tuple[str, ...]]) -> None:
    done = Verdict("dequantize_4bit", "float16", "wrong", "W: error 1, limit 0")
    store_verdicts(device_key(CPU), {("dequantize_4bit", "float16"): done})
    found, why = ensure_checked(CPU)
    assert why == ""
    assert found["dequantize_4bit", "float16"] == done
    assert failure("dequantize_4bit", "float16", CPU)
    (ops,) = short_form
    assert "dequantize_4bit" not in ops
    assert "rank_gradients" in ops
    ensure_checked(CPU)
    assert len(short_form) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_check_keeps_each_verdict(jobs: int) -> None:
    told: list[tuple[str, str]] = []

    def tell(verdict: Verdict) -> None:
        told.append((verdict.op, verdict.configuration))
        if len(told) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_device(CPU, ops=("first", "wrong", "hangs"), worker=WORKER, told=tell, jobs=jobs)
    assert len(told) < 5  # another process may tell one more before it is ended
    assert set(read_verdicts(device_key(CPU))) == set(told)


def test_the_short_form_is_stored_verdict_by_verdict() -> None:
    def tell(verdict: Verdict) -> None:
        if verdict.op == "wrong":
            raise KeyboardInterrupt

    ops = ("first", "wrong", "last")
    with pytest.raises(KeyboardInterrupt):
        check_device(CPU, ops=ops, short=True, worker=WORKER, told=tell)
    assert {op for op, _ in read_verdicts(device_key(CPU))} == {"first", "wrong"}


def test_ctrl_c_reaches_the_worker_first() -> None:
    with pytest.raises(KeyboardInterrupt):
        check_device(CPU, ops=("first", "interrupted"), worker=WORKER, jobs=2)
    assert {op for op, _ in read_verdicts(device_key(CPU))} <= {"first"}
    assert not FAILURES


def test_an_interrupted_command_says_where_its_verdicts_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")

    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "check_device", interrupted)
    assert main(["check", "--device", "cpu"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"interrupted: the verdicts above are kept in {file_of(device_key(CPU))}"


@pytest.mark.parametrize("short", [True, False])
def test_a_process_that_is_killed_is_no_proof(short: bool) -> None:
    ops = ("first", "killed", "last")
    key, good = device_key(CPU), Verdict("killed", "float16", "ok", "")
    store_verdicts(key, {("killed", "float16"): good})
    found, why = check_device(CPU, short=short, ops=ops, worker=WORKER)
    assert why == ""
    assert found["killed", "float16"].outcome == "unchecked"
    assert "SIGKILL" in found["killed", "float16"].detail
    assert read_verdicts(key)["killed", "float16"] == good  # an earlier verdict stays
    assert read_verdicts(key)["last", "float16"].outcome == "ok"
    assert failure("killed", "float16", CPU) == ""


def test_a_kernel_that_never_ends_is_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_runner, "run_worker", partial(run_worker, seconds=0.5))
    found, _ = check_device(CPU, short=True, ops=("hangs",), worker=WORKER)
    assert found["hangs", "float16"].outcome == "crashed"
    assert read_verdicts(device_key(CPU)) == found


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), "unchecked"),
        (RuntimeError("CUDA error: out of memory"), "unchecked"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "unchecked"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "unchecked"),
        (ImportError("libtriton.so: cannot open shared object file"), "unchecked"),
        (OSError(28, "No space left on device"), "unchecked"),
        (RuntimeError("Failed to find C compiler. Please specify"), "unchecked"),
        (ValueError("out of resource: shared memory, Required: 106496"), "refused"),
    ],
)
def test_an_error_of_the_machine_is_no_verdict(error: Exception, outcome: str) -> None:
    def trials() -> list[Trial]:
        raise error

    check = Check("scale", "float16", trials, lambda: Decision("triton", ""))
    assert verdict_of(check, None).outcome == outcome
    wrapped = LaunchError("scale (float16): expected a kernel that runs")
    wrapped.__cause__ = LaunchError(f"_scale_kernel: {error}")
    wrapped.__cause__.__cause__ = error

    def launches() -> list[Trial]:
        raise wrapped

    found = verdict_of(replace(check, trials=launches), None)
    assert found.outcome == outcome
    assert found.detail.startswith("LaunchError: _scale_kernel: ")


def test_a_lost_device_ends_the_process() -> None:
    def trials() -> list[Trial]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    check = Check("scale", "float16", trials, lambda: Decision("triton", ""))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        verdict_of(check, None)


def test_unchecked_kernels_end_the_command_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    busy = Verdict("scale", "float16", "unchecked", "OutOfMemoryError: CUDA out of memory")
    found = {("scale", "float16"): busy, ("product", "float16"): GOOD}
    monkeypatch.setattr(cli, "check_device", lambda *given, **named: (found, ""))
    assert main(["check", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert "1 kernels checked, 0 will not be used" in printed.out
    assert "1 unchecked (scale: OutOfMemoryError" in printed.err
    assert "Try again" in printed.err


@pytest.fixture
def broken_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A triton that is installed and cannot be imported."""
    (tmp_path / "triton.py").write_text("raise ImportError('GLIBC_2.99 not found')")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for asked in (triton_available, triton_problem):
        asked.cache_clear()
    yield
    for asked in (triton_available, triton_problem):
        asked.cache_clear()


@pytest.mark.usefixtures("broken_triton")
@pytest.mark.parametrize("more", [["--short"], ["--tune"]])
def test_a_broken_triton_is_one_error(
    more: list[str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--device", "cpu", *more]) == 2
    assert capsys.readouterr().err == (
        "error: check: triton cannot be imported: ImportError: GLIBC_2.99 not found; nothing was "
        "checked. Reinstall triton\n"
    )
    assert not cache.exists()


@pytest.mark.usefixtures("broken_triton")
def test_a_broken_triton_is_not_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, CPU, GPUS["sm_90"].chip)
    decision = select("scale", CPU, torch.float16)
    assert decision.backend == "torch"
    assert decision.reason.startswith("triton cannot be imported: ImportError: GLIBC")


def test_a_cpu_has_no_number() -> None:
    assert device_named("cpu:3", "check") == CPU
    check_device(torch.device("cpu:0"), short=True, ops=("asks",), worker=WORKER)
    assert read_verdicts(device_key(CPU))["asks", "float16"].detail == "cpu, interpreter 1"


def test_a_kernel_that_never_ends() -> None:
    request = {"device": "cpu", "ops": ["hangs"], "short": True, "done": []}
    entries = run_worker(WORKER, request, seconds=0.5)
    with pytest.raises(StopIteration) as stopped:
        next(entries)
    assert stopped.value.value.starts == ["hangs", "float16"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (bits("W", torch.ones(2), torch.ones(2)), ""),
        (bits("W", torch.ones(2), torch.tensor([1.0, 1.5])), "W: error 0.5, limit 0"),
        (close("y", torch.full((2,), torch.nan), torch.ones(2)), "y: error nan"),
        (close("y", torch.ones(2).half(), torch.full((2,), 1.003)), ""),
        (close("y", torch.ones(2).half(), torch.full((2,), 1.01)), "y: error 0.01, limit 0.00404"),
        (Pair("y", torch.ones(2), torch.ones(3), 1.0), "y: shape (2,), expected (3,)"),
    ],
)
def test_limits(pair: Pair, message: str) -> None:
    assert pair.violation().startswith(message)
    assert bool(pair.violation()) == bool(message)


def test_every_op_has_a_check_of_its_own() -> None:
    found = list(kernel_checks(CPU, Shape(64, 64, 8), interpreted=False))
    assert {check.op for check in found} == set(OPS)
    names = [(check.op, check.configuration) for check in found]
    assert len(set(names)) == len(names)


def test_every_op_that_launches_has_a_check() -> None:
    """Ops are named where they run: ``run("op", …)``, ``attempt("op", …)``, ``select("op", …)``."""
    package = Path(verdicts.__file__).parent
    calls = [
        node
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and node.args
        and getattr(node.func, "id", "") in ("run", "attempt", "select", "launches", "note_refusal")
    ]
    named = {c.args[0].value for c in calls if isinstance(c.args[0], ast.Constant)}
    assert len(named) >= 10
    assert named <= set(OPS)


def interpreted(script: str, *arguments: str) -> str:
    """What a script prints, with Triton's interpreter."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip()


def test_two_broken_kernels_are_switched_off() -> None:
    assert interpreted("switched_off_script.py").endswith("agrees")


def test_tensors_with_gaps_and_without_rows() -> None:
    assert interpreted("odd_inputs_script.py", "sample").endswith("checks agree")


@pytest.mark.slow
def test_tensors_with_gaps_of_more_sizes() -> None:
    assert interpreted("odd_inputs_script.py").endswith("checks agree")


@pytest.mark.slow
def test_every_kernel_in_bf16() -> None:
    assert interpreted("bf16_script.py").endswith("checks agree")


@pytest.mark.slow
def test_the_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert main(["check", "--short"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no CUDA device: Triton's interpreter runs the kernels")
    assert "0 will not be used" in printed


@pytest.mark.parametrize("shape", [("0", "64", "8"), ("80", "100", "8"), ("80", "64", "-1")])
def test_sizes_that_cannot_be_packed(
    shape: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--shape", *shape]) == 2
    assert f"K a multiple of 64, got {' '.join(shape)}" in capsys.readouterr().err


def test_a_models_sizes_are_whole_blocks() -> None:
    model = ModelShapes(linear=((32001, 1000), (64, 64)), experts=((4, 64, 64),))
    assert model.for_checks(7) == [(32016, 1024, 7), (64, 64, 7)]


@pytest.mark.parametrize("command", ["check", "bench"])
@pytest.mark.parametrize("name", ["banana", "mps", "meta", "cuda:x"])
def test_another_kind_of_device(
    command: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*given: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    assert main([command, "--device", name]) == 2
    told = f"{command}: expected --device cuda, cuda:0 … or cpu, got {name}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_gpu_beyond_the_last(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([command, "--device", "cuda:7"]) == 2
    told = f"{command}: expected a device of this machine, got cuda:7: 2 CUDA devices"
    assert told in capsys.readouterr().err


def test_shapes_of_a_model_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    monkeypatch.setattr(cli, "triton_available", lambda: True)
    monkeypatch.setattr(cli, "shapes_of", lambda model: ModelShapes(linear=((64, 64),)))
    monkeypatch.setattr(cli, "check_device", lambda *given, **options: ({}, ""))
    config = tmp_path / "config.json"
    BUILDERS["llama"]().config.to_json_file(config)
    assert main(["check", "--model", str(config)]) == 0
    assert "shapes of --model are not checked: the interpreter" in capsys.readouterr().out
    assert main(["check"]) == 0
    assert "--model" not in capsys.readouterr().out


def test_races_without_triton(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "triton_available", lambda: False)
    monkeypatch.setattr(cli, "tune_device", lambda *given, **options: ([], ""))
    assert main(["check", "--device", "cpu", "--tune"]) == 0
    assert "kernels not checked: no triton" in capsys.readouterr().out


def test_help_names_the_ops(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    printed = capsys.readouterr().out
    assert all(op in printed for op in OPS)
    assert "TOKENS rows of x" in " ".join(printed.split())


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert main(["check", "--device", "cuda:0"]) == 2
    assert "expected a device of this machine, got cuda:0" in capsys.readouterr().err
