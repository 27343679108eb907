"""The short check of kernels when fit starts: where it runs, and what it says."""

from __future__ import annotations

import pytest
import torch
from lightning_peft_kernels.dispatch import Backend
from lightning_peft_kernels.verdicts import Verdict

from lightning_peft.callback import kernel_check
from lightning_peft.callback.kernel_check import check_kernels
from lightning_peft.diagnostics import check_runner

CUDA = torch.device("cuda", 0)
FOUND = {
    ("scale", "float16"): Verdict("scale", "float16", "ok", ""),
    ("product", "float16"): Verdict("product", "float16", "wrong", "y: error 3, limit 0.1"),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices that were checked."""
    devices: list[torch.device] = []

    def ensure(device: torch.device) -> tuple[dict[tuple[str, str], Verdict], str]:
        devices.append(device)
        return FOUND, "cache: not written: read-only"

    monkeypatch.setattr(check_runner, "ensure_checked", ensure)
    monkeypatch.setattr(kernel_check, "triton_available", lambda: True)
    return devices


def test_a_wrong_kernel_is_named_and_the_run_goes_on(asked: list[torch.device]) -> None:
    assert check_kernels(CUDA, "auto") == [
        "kernels: product (float16) is wrong on cuda:0 and not used: y: error 3, limit 0.1",
        "kernels are checked again in the next run: cache: not written: read-only",
    ]
    assert asked == [CUDA]


@pytest.mark.parametrize(
    ("device", "backend", "switch"),
    [(torch.device("cpu"), "auto", "1"), (CUDA, "torch", "1"), (CUDA, "auto", "0")],
)
def test_where_nothing_is_checked(
    device: torch.device, backend: Backend, switch: str, asked: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LIGHTNING_PEFT_CHECK", switch)
    assert check_kernels(device, backend) == []
    assert asked == []


def test_what_could_not_be_tried_is_no_fault(
    asked: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = Verdict("scale", "float16", "unchecked", "OutOfMemoryError: CUDA out of memory")
    monkeypatch.setitem(FOUND, ("scale", "float16"), busy)
    assert check_kernels(CUDA, "auto")[1] == (
        "kernels: scale: unchecked on cuda:0 and checked again in the next run: "
        "OutOfMemoryError: CUDA out of memory"
    )


@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError, TypeError])
def test_a_check_that_cannot_start_ends_no_run(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ensure(device: torch.device) -> None:
        raise kind("the device is busy")

    monkeypatch.setattr(check_runner, "ensure_checked", ensure)
    monkeypatch.setattr(kernel_check, "triton_available", lambda: True)
    with pytest.warns(UserWarning, match="kernels are unchecked: the device is busy"):
        assert check_kernels(CUDA, "auto") == []
