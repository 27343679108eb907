"""The one function that launches: its device, refused kernels, and what replaces them."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning_peft_kernels import chips, dispatch, launch
from lightning_peft_kernels.chips import CHIPS
from lightning_peft_kernels.dispatch import run, select
from lightning_peft_kernels.launch import FAILURES, LaunchError

from tests.helpers.fake_gpu import GPUS

CPU = torch.device("cpu")
FP16 = torch.float16
errors = pytest.importorskip("triton.runtime.errors")
compiler = pytest.importorskip("triton.compiler.errors")


class Kernel:
    """A kernel that records its launches, or raises."""

    __name__ = "product_kernel"

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, list[tuple[Any, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def called(*arguments: Any, **options: Any) -> None:
            if self.error is not None:
                raise self.error
            self.calls.append((grid, arguments, options))

        return called


@pytest.fixture(autouse=True)
def no_failures() -> Iterator[None]:
    FAILURES.clear()
    yield
    FAILURES.clear()


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHIPS, CPU, GPUS["sm_90"].chip)


REFUSALS = [
    errors.OutOfResources(106_496, 101_376, "shared memory"),
    errors.PTXASError("ptxas fatal: unknown architecture"),
    compiler.CompilationError("x = 1", None, "type fp8e4nv not supported"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    subprocess.CalledProcessError(1, ["gcc"]),
]


def by_kernel(kernel: Kernel) -> str:
    launch.launch(kernel, (1,), torch.zeros(1))
    return "kernel"


def product(kernel: Kernel, backend: dispatch.Backend = "auto") -> str:
    return run("product", CPU, FP16, backend, lambda: by_kernel(kernel), lambda: "torch")


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_refused_kernel_is_replaced_and_named_once(error: Exception) -> None:
    kernel = Kernel(error)
    assert select("product", CPU, FP16).backend == "triton"
    with pytest.warns(UserWarning, match=r"product \(float16\).*product_kernel.*torch computes it"):
        assert product(kernel) == "torch"
    decision = select("product", CPU, FP16)
    assert decision.backend == "torch"
    name = type(error).__name__
    assert decision.reason.startswith(f"product does not run on cpu: product_kernel: {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert product(kernel) == "torch"


@pytest.mark.usefixtures("on_hopper")
def test_other_configurations_still_run() -> None:
    with pytest.warns(UserWarning, match="float16"):
        product(Kernel(REFUSALS[0]))
    assert select("product", CPU, torch.bfloat16).backend == "triton"
    assert select("other", CPU, FP16).backend == "triton"
    assert select("product", CPU, FP16, detail="64 rows").backend == "triton"


@pytest.mark.usefixtures("on_hopper")
def test_requested_triton_raises() -> None:
    for _ in range(2):
        with pytest.raises(
            LaunchError,
            match=r"^product \(float16\): expected a kernel that runs on cpu, got product_kernel: "
            r".*106496.*; use kernels='auto', which computes this op with torch$",
        ):
            product(Kernel(REFUSALS[0]), "triton")
    assert not FAILURES


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), KeyError("x")]
)
def test_errors_of_kernels_that_ran_are_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        product(Kernel(error))
    assert not FAILURES


class Elsewhere:
    """Stands for a tensor on the second device."""

    device = torch.device("cuda", 1)


def test_the_device_is_guarded_only_where_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    entered: list[torch.device] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)
            self.before, current[0] = current[0], self.device.index

        def __exit__(self, *exception: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    seen: list[int] = []

    class Recorded(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(current[0])
            return super().__getitem__(grid)

    kernel = Recorded()
    launch.launch(kernel, (3,), Elsewhere(), 7, BLOCK=4)  # type: ignore[arg-type]
    assert (seen, entered, current) == ([1], [Elsewhere.device], [0])
    current[0] = 1
    launch.launch(kernel, (3,), Elsewhere(), 7, BLOCK=4)  # type: ignore[arg-type]
    assert (seen, entered) == ([1, 1], [Elsewhere.device])
    (grid, (_, number), options) = kernel.calls[0]
    assert (grid, number, options) == ((3,), 7, {"BLOCK": 4})


def test_limits_are_read_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor, shared_memory_per_block = 8, 6, 49_152
        shared_memory_per_block_optin = 101_376

    asked: list[torch.device] = []

    def properties(device: torch.device) -> type[Properties]:
        asked.append(device)
        return Properties

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(chips, "CHIPS", {})
    for device in ("cuda:2", "cuda:2", "cuda"):
        found = chips.chip_of(torch.device(device))
        assert found == GPUS["sm_86"].chip
    assert asked == [torch.device("cuda", 2)]
