"""Optimizers with pooled state: one launch per step; non-finite gradients skip a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from lightning_peft_kernels.optim.adamw_8bit import PooledStep, pooled_8bit_step
from lightning_peft_kernels.optim.step_inputs import rows_on
from torch import Tensor

from lightning_peft.optim.state_conversion import pack
from lightning_peft.optim.state_pool import FIELDS_8BIT, Field, StatePool, local

__all__ = ["AdamW8bit", "Lion8bit", "PagedAdamW8bit", "PagedAdamW32bit", "PooledOptimizer"]

Group = dict[str, Any]


class _Item(NamedTuple):
    """A parameter with its gradient and group; `shard` and `part` are what this process holds."""

    param: Tensor
    grad: Tensor
    group: Group
    shard: Tensor
    part: Tensor


class PooledOptimizer(torch.optim.Optimizer):
    """Base class: the state of all parameters lies in one buffer per device.

    If a gradient is not finite, the step is skipped: parameters, state and step counts stay as they
    are, and `skipped_steps` counts it. Under GradScaler, `found_inf` and `grad_scale` are read as
    in torch's fused optimizers. Processes that share DTensor gradients agree on the skip. Other
    gradients must be reduced already: every process then makes the same decision.

    Group keys: lr, betas, eps, weight_decay, maximize.
    """

    FIELDS: ClassVar[Mapping[str, Field]] = FIELDS_8BIT
    PAGED: ClassVar[bool] = False
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "maximize": False,
    }
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], **hyper: Any) -> None:
        unknown = set(hyper) - set(self.DEFAULTS)
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: expected {sorted(self.DEFAULTS)}, got {sorted(unknown)}"
            )
        super().__init__(params, {**self.DEFAULTS, **hyper})

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because a gradient was not finite."""
        return int(sum(float(count) for count in vars(self).get("_skipped", {}).values()))

    @property
    def state_bytes(self) -> int:
        """Size of the pooled buffers in bytes."""
        return sum(pool.buffer.numel() for pool in self._pools().values())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and return the value of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        by_device: dict[torch.device, list[_Item]] = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__}: expected dense gradients, got sparse; use "
                        "sparse=False"
                    )
                shard = local(p)
                by_device[shard.device].append(_Item(p, p.grad, group, shard, local(p.grad)))
        pools = self._pools()
        founds = {device: self._found(part, device) for device, part in by_device.items()}
        if len(founds) > 1:
            together = float(sum(float(found) for found in founds.values()) > 0)
            founds = {device: found.new_tensor(together) for device, found in founds.items()}
        for device, part in by_device.items():
            found, pool = founds[device], pools[device]
            skipped = vars(self).setdefault("_skipped", {})
            skipped[device] = skipped.get(device, 0) + found
            rows = pool.rows_of([item.param for item in part])
            pool.steps.index_add_(0, rows, (1 - found).expand(len(part)))
            if device.type == "cpu" and float(found):
                continue
            pool.prefetch()
            kinds: dict[tuple[Any, ...], list[_Item]] = defaultdict(list)
            for item in part:
                if item.shard.numel():
                    kinds[item.param.dtype, item.grad.dtype, item.group["maximize"]].append(item)
            for same in kinds.values():
                self._update(pool, same, found)

    def _found(self, items: list[_Item], device: torch.device) -> Tensor:
        """Return 1 if a gradient is not finite, else 0: an fp32 scalar, without a wait."""
        grads = [item.part for item in items]
        scaler = getattr(self, "found_inf", None)
        found = torch.zeros((), device=device)
        if device.type == "cpu":
            # NaN and Inf survive a sum. A sum that overflows by itself is rare and is examined.
            suspects = [g for g in grads if not g.sum().isfinite()]
            if any(not bool(g.isfinite().all()) for g in suspects):
                found.fill_(1)
        else:
            norms = torch._foreach_norm([g for g in grads if g.numel()] or [found], float("inf"))
            found = (~torch.stack([n.float() for n in norms]).isfinite().all()).float()
        if scaler is not None:
            found = torch.maximum(found, (scaler.to(device) > 0).float().reshape(()))
        meshes = {item.grad.device_mesh for item in items if hasattr(item.grad, "device_mesh")}
        for mesh in meshes:
            for axis in range(mesh.ndim):
                dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(axis))
        return found

    def _hyper(self, pool: StatePool, items: list[_Item]) -> Tensor:
        """Return the rows for `pooled_8bit_step`, computed in fp64 and rounded once."""
        told = []
        for item in items:
            g = item.group
            told.append((float(g["lr"]), g["weight_decay"], g["eps"], *map(float, g["betas"])))
        lr, decay, eps, beta1, beta2 = rows_on(pool.steps.device, told, torch.float64).unbind(1)
        rows = pool.rows_of([item.param for item in items])
        step, eps = self._sizes(lr, eps, beta1, beta2, pool.steps[rows].double())
        return torch.stack(
            [1 - lr * decay, step, eps, beta1, 1 - beta1, beta2, 1 - beta2], 1
        ).float()

    def _sizes(
        self, lr: Tensor, eps: Tensor, beta1: Tensor, beta2: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        second = (1 - beta2**steps).sqrt()
        return lr * second / (1 - beta1**steps), eps * second

    def _update(self, pool: StatePool, items: list[_Item], found: Tensor) -> None:
        shards = [item.shard for item in items]
        whole = [shard.detach().contiguous() for shard in shards]
        scale = getattr(self, "grad_scale", None)
        pooled_8bit_step(
            PooledStep(
                whole,
                [item.part.contiguous() for item in items],
                [pool.starts[item.param] for item in items],
                self._hyper(pool, items),
                code1=pool.fields["state1"],
                absmax1=pool.fields["absmax1"],
                code2=pool.fields.get("state2"),
                absmax2=pool.fields.get("absmax2"),
                grad_scale=None if scale is None else scale.to(found.device),
                found_inf=found if found.device.type == "cuda" else None,
                maximize=items[0].group["maximize"],
            )
        )
        for shard, copy in zip(shards, whole, strict=True):
            if copy.data_ptr() != shard.data_ptr():
                shard.copy_(copy)

    def _pools(self) -> dict[torch.device, StatePool]:
        """Return the pools, rebuilt if parameters were added or moved, or states were set."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        pools: dict[torch.device, StatePool] = vars(self).setdefault("_pool_by_device", {})
        for p in params:
            pool = pools.get(p.device)
            if pool is None or p not in pool.views or self.state.get(p) is not pool.views[p]:
                break
        else:
            return pools
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for p in params:
            by_device[local(p).device].append(p)
        made = {
            device: StatePool(own, self.FIELDS, self.PAGED) for device, own in by_device.items()
        }
        for pool in made.values():
            for p, views in pool.views.items():
                if self.state.get(p):
                    pool.fill(p, pack(self.state[p], list(self.FIELDS)))
                self.state[p] = views
        vars(self)["_pool_by_device"] = made
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict like torch's. Each state is a copy without the pool's padding."""
        saved = super().state_dict()
        saved["state"] = {
            key: {name: value.clone() for name, value in state.items()}
            for key, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class, of torch.optim.AdamW or of bitsandbytes.

        A paged optimizer pages what it loads.

        Raises:
            ValueError: groups of another size, or a state of another number of elements.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        keys = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        if len(keys) != len(params):
            raise ValueError(
                f"optimizer state: expected {len(params)} parameters, got {len(keys)}; load it "
                "into the optimizer it was saved from"
            )
        first = next(iter(self.FIELDS))
        states = {}
        for key, p in zip(keys, params, strict=True):
            if key not in state_dict["state"]:
                continue
            states[p] = pack(state_dict["state"][key], list(self.FIELDS))
            if states[p][first].numel() != local(p).numel():
                raise ValueError(
                    f"optimizer state {key}: expected {local(p).numel()} elements, got "
                    f"{states[p][first].numel()}; cut it with lightning_peft.optim.shard"
                )
        groups = [
            {**{k: v for k, v in own.items() if k != "params"}, **group}
            for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ]
        if len(groups) != len(state_dict["param_groups"]):
            groups = list(state_dict["param_groups"])
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.clear()
        self.state.update(states)
        vars(self).pop("_pool_by_device", None)
        self._pools()


class AdamW8bit(PooledOptimizer):
    """AdamW (arXiv:1711.05101) with blockwise 8-bit moments, 2.03 bytes per element."""


class PagedAdamW8bit(AdamW8bit):
    """`AdamW8bit` with its state in managed memory on CUDA."""

    PAGED = True


class Lion8bit(PooledOptimizer):
    """Lion (arXiv:2302.06675) with a blockwise 8-bit momentum, 1.02 bytes per element."""

    FIELDS = {name: FIELDS_8BIT[name] for name in ("state1", "absmax1")}

    def _sizes(
        self, lr: Tensor, eps: Tensor, beta1: Tensor, beta2: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        return lr, eps


class PagedAdamW32bit(PooledOptimizer):
    """AdamW with fp32 moments in managed memory on CUDA; the update of torch.optim.AdamW."""

    FIELDS = {name: Field(torch.float32, shaped=True) for name in ("exp_avg", "exp_avg_sq")}
    PAGED = True

    def _update(self, pool: StatePool, items: list[_Item], found: Tensor) -> None:
        groups: dict[int, list[_Item]] = defaultdict(list)
        for item in items:
            groups[id(item.group)].append(item)
        scale = getattr(self, "grad_scale", None)
        for own in groups.values():
            group, shards = own[0].group, [item.shard for item in own]
            # torch's fused step expects one dtype, so half precision goes through fp32 copies.
            masters = [shard.detach().float() for shard in shards]
            torch._fused_adamw_(
                masters,
                [item.part.float() for item in own],
                [pool.views[item.param]["exp_avg"] for item in own],
                [pool.views[item.param]["exp_avg_sq"] for item in own],
                [],
                [pool.views[item.param]["step"] for item in own],
                amsgrad=False,
                lr=float(group["lr"]),
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                grad_scale=None if scale is None else scale.to(found.device),
                found_inf=found if found.device.type == "cuda" else None,
            )
            for shard, master in zip(shards, masters, strict=True):
                if master.data_ptr() != shard.data_ptr():
                    shard.copy_(master)
