"""Pooled optimizers against torch.optim.AdamW, bitsandbytes and an uninterrupted run."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_peft.optim import OPTIMIZERS, convert_optimizer, join_shards, shard, to_torch

SHAPES = [(8, 300), (300, 8), (77,), (16, 600)]


def _params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]


def _adamw(params: list[Any], **kw: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, **kw)


def _train(opt: torch.optim.Optimizer, turns: range) -> None:
    for turn in turns:
        generator = torch.Generator().manual_seed(turn)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_tracks_adamw(name: str) -> None:
    ours, theirs = _params(), _params()
    a, b = _adamw(ours), _adamw(theirs)
    convert_optimizer(a, name)
    _train(a, range(20))
    _train(b, range(20))
    for p, q, start in zip(ours, theirs, _params(), strict=True):
        moved = (q - start).norm()
        limit = 1e-5 if "32" in name else 0.05
        assert (p - q).norm() <= limit * moved


def test_loss_follows_adamw_over_300_steps() -> None:
    torch.manual_seed(1)
    x, target = torch.randn(256, 64), torch.randn(64, 32)
    losses = []
    for name in (None, "adamw_8bit"):
        torch.manual_seed(2)
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
        opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
        if name:
            convert_optimizer(opt, name)
        for _ in range(300):
            loss = (net(x) - x @ target / 8).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        losses.append(loss.item())
    assert abs(losses[1] / losses[0] - 1) < 0.01, losses


def test_matches_bitsandbytes_within_its_rounding() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(64, 100))
    theirs, exact = (torch.nn.Parameter(ours.detach().clone()) for _ in range(2))
    a, b = torch.optim.AdamW([ours], lr=1e-2), bnb.optim.AdamW8bit([theirs], lr=1e-2)
    b.param_groups[0]["weight_decay"] = 1e-2
    c = torch.optim.AdamW([exact], lr=1e-2)
    convert_optimizer(a, "adamw_8bit")
    for opt in (a, b, c):
        _train(opt, range(10))
    error = (theirs - exact).norm()
    assert (ours - theirs).norm() <= 2 * error
    assert (ours - exact).norm() <= error


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_resume_is_exact(name: str) -> None:
    whole, first, second = _params(), _params(), _params()
    a, b, c = _adamw(whole), _adamw(first), _adamw(second)
    for opt in (a, b, c):
        convert_optimizer(opt, name)
    _train(a, range(8))
    _train(b, range(4))
    file = io.BytesIO()
    torch.save({"opt": b.state_dict(), "params": [p.detach() for p in first]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, value in zip(second, saved["params"], strict=True):
            p.copy_(value)
    c.load_state_dict(saved["opt"])
    _train(c, range(4, 8))
    for i, (p, q) in enumerate(zip(whole, second, strict=True)):
        assert torch.equal(p, q), i


def test_bytes_an_element() -> None:
    opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(64, 1024))])
    convert_optimizer(opt, "adamw_8bit")
    assert opt.state_bytes / (64 * 1024) <= 2.1  # type: ignore[attr-defined]
    _train(opt, range(1))
    kept = sum(t.nbytes for s in opt.state_dict()["state"].values() for t in s.values())
    assert kept / (64 * 1024) <= 2.1


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(name: str, bad: float) -> None:
    params = _params()
    opt = _adamw(params)
    convert_optimizer(opt, name)
    _train(opt, range(2))
    before, state = [p.detach().clone() for p in params], opt.state_dict()["state"]
    params[1].grad[0, 0] = bad  # type: ignore[index]
    opt.step()
    assert opt.skipped_steps == 1  # type: ignore[attr-defined]
    after = opt.state_dict()["state"]
    for i, (p, q) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, q)
        assert all(torch.equal(state[i][key], after[i][key]) for key in state[i])
    _train(opt, range(2, 3))
    assert all(p.isfinite().all() for p in params)


def test_grad_scaler_attributes_and_parameters_without_gradient() -> None:
    ours, theirs = _params(), _params()
    a, b = _adamw(ours), _adamw(theirs)
    convert_optimizer(a, "adamw_8bit")
    convert_optimizer(b, "adamw_8bit")
    for p, q in zip(ours[:2], theirs[:2], strict=True):
        q.grad = torch.ones_like(q)
        p.grad = q.grad * 8
    a.grad_scale, a.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    a.step()
    b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    assert float(a.state[ours[2]]["step"]) == 0
    assert torch.equal(ours[2], _params()[2])
    a.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    kept = ours[0].detach().clone()
    a.step()
    assert torch.equal(ours[0], kept)


def test_states_convert() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = [torch.nn.Parameter(torch.randn(64, 100))]
    source = bnb.optim.AdamW8bit(theirs, lr=1e-2)
    _train(source, range(3))
    ours = [torch.nn.Parameter(theirs[0].detach().clone())]
    opt = _adamw(ours)
    convert_optimizer(opt, "adamw_8bit")
    opt.load_state_dict(source.state_dict())
    assert torch.equal(opt.state[ours[0]]["state1"], source.state[theirs[0]]["state1"].view(-1))
    assert float(opt.state[ours[0]]["step"]) == 3
    plain = _adamw([torch.nn.Parameter(ours[0].detach().clone())])
    plain.load_state_dict(to_torch(opt.state_dict(), {0: ours[0].shape}))
    back = _adamw(ours)
    convert_optimizer(back, "adamw_8bit")
    back.load_state_dict(plain.state_dict())
    # Requantising what was dequantised gives the codes again.
    assert torch.equal(back.state[ours[0]]["state2"], opt.state[ours[0]]["state2"])


@pytest.mark.parametrize(("cut", "exact"), [(512, True), (500, False)])
def test_states_cut_and_join(cut: int, exact: bool) -> None:
    p = torch.nn.Parameter(torch.randn(1000))
    opt = _adamw([p])
    convert_optimizer(opt, "adamw_8bit")
    _train(opt, range(2))
    state = opt.state_dict()["state"][0]
    joined = join_shards([shard(state, 0, cut), shard(state, cut, 1000 - cut)])
    assert torch.equal(joined["state1"], state["state1"]) or not exact
    assert (joined["state1"].int() - state["state1"].int()).abs().float().mean() < 1.0


class DeviceTensors(TorchFunctionMode):
    """Counts tensors that are made on a device from Python numbers: the host waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.tensor and (kwargs or {}).get("device") is not None:
            self.made.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_step_makes_no_tensor_on_the_device_from_numbers(name: str) -> None:
    """Also if another set of parameters gets gradients."""
    params = [torch.nn.Parameter(torch.randn(300)) for _ in range(3)]
    optimizer = OPTIMIZERS[name](params, lr=1e-2)
    counts = []
    for given in (params, params[:2], params, params[:2]):
        optimizer.zero_grad()
        for p in given:
            p.grad = torch.ones_like(p)
        with DeviceTensors() as found:
            optimizer.step()
        counts.append(len(found.made))
    assert counts == [0, 0, 0, 0]


def test_scheduler_hooks_and_closure_stay() -> None:
    params = _params()
    opt = _adamw(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1 / (n + 1))
    convert_optimizer(opt, "adamw_8bit")
    calls: list[str] = []
    opt.register_step_post_hook(lambda *_: calls.append("hook"))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    assert float(opt.step(closure)) > 0
    scheduler.step()
    assert calls == ["hook"]
    assert opt.param_groups[0]["lr"] == pytest.approx(5e-3)
    assert float(opt.state[params[0]]["step"]) == 1
    assert opt._opt_called  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "name", "error", "match"),
    [
        (lambda p: torch.optim.SGD(p, lr=1), "adamw_8bit", TypeError, "got SGD"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "adamw_8bit", ValueError, "L2 term 0.1"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "lion_8bit", ValueError, "amsgrad"),
        (lambda p: torch.optim.AdamW(p), "adam9", ValueError, "'adam9'"),
    ],
)
def test_what_is_refused(make: Any, name: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        convert_optimizer(make(_params()), name)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_under_a_grad_scaler(name: str) -> None:
    """Scaled gradients give the steps of plain ones; an overflow leaves the step out and halves the
    scale."""
    scaled, plain = _params(), _params()
    a, b = _adamw(scaled), _adamw(plain)
    for opt in (a, b):
        convert_optimizer(opt, name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for turn in range(4):
        overflows = turn == 2
        scaler.scale(torch.ones(()))  # as a loss would be: the scale is made at the first one
        for params, factor in ((scaled, scaler.get_scale()), (plain, 1.0)):
            g = torch.Generator().manual_seed(turn)
            for p in params:
                p.grad = torch.randn(p.shape, generator=g) * factor
        before = [p.detach().clone() for p in scaled]
        if overflows:
            scaled[1].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(a)
        scaler.update()
        if overflows:
            assert all(torch.equal(p, q) for p, q in zip(scaled, before, strict=True))
            assert scaler.get_scale() == 512.0
            continue
        b.step()
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SGD, torch.optim.SparseAdam])
def test_optimizers_of_another_family_are_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=f"AdamW or Adam, got {make.__name__}"):
        convert_optimizer(make(_params()), "adamw_8bit")
