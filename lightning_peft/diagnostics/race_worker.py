"""Races the ways that a device offers for the products of a model, in a process of its own.

    python -m lightning_peft.diagnostics.race_worker REQUEST

Each way runs as production would run it: its selection is forced, its result is compared with the
dequantised product, and a way that is wrong, refused or slower than its fallback cannot win.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from lightning_peft_kernels.chips import chip_of, tile_rows, why_no_tile
from lightning_peft_kernels.experts.grouped_linear import nf4_grouped_linear
from lightning_peft_kernels.experts.groups import Groups
from lightning_peft_kernels.launch import FAILURES
from lightning_peft_kernels.lora.rank_gradients import rank_gradients
from lightning_peft_kernels.nf4.bf16_cpu import has_bf16_product
from lightning_peft_kernels.nf4.bitsandbytes_product import fused_tokens
from lightning_peft_kernels.nf4.linear import nf4_linear, nf4_lora_linear
from lightning_peft_kernels.nf4.ops import Packed4bit
from lightning_peft_kernels.nf4.projections import Projection, nf4_grouped_projections
from lightning_peft_kernels.nf4.selection import FEW_TOKENS, select_group, select_pairs
from lightning_peft_kernels.races import Question, Race, use_races
from torch import Tensor

from lightning_peft.diagnostics.pairs import packed_on, randn, wrong_by
from lightning_peft.diagnostics.timing import medians

__all__ = ["ALWAYS", "Contest", "RaceRequest", "contests", "race"]

#: Limit of a race that holds for any larger number of tokens.
ALWAYS = 1 << 30
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_EXPERT_ROWS = (1, 4, 16, 32, 64, 128)
_MOST_EXPERTS = 8  # of a stack: more change no time per expert
_RANK = 16


@dataclass(frozen=True)
class RaceRequest:
    """The work of one worker process.

    Attributes:
        device: Where the ways run.
        dtype: Dtype of x, ``"bfloat16"``.
        linear: (N, K) of linear layers.
        groups: (N_1, …, N_n, K) of layers over one input.
        experts: (experts, N, K) of stacks of experts.
        done: Contests to leave out, by name.
        banned: Ways that ended a process, as "question way".
        repeats: Runs of each way.
        tokens: Most tokens of a product.
    """

    device: str
    dtype: str
    linear: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    experts: tuple[tuple[int, ...], ...] = ()
    done: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    repeats: int = 15
    tokens: int = 256


@dataclass(frozen=True)
class Contest:
    """One choice on one shape.

    Attributes:
        question: What is chosen.
        shape: Its shape, see `Race`.
        tokens: Rows at which the ways are timed.
        limit: Rows up to which the winner is taken.
        ways: Names of the ways.
        run: Runs the way that is selected; returns what is compared.
    """

    question: Question
    shape: tuple[int, ...]
    tokens: int
    limit: int
    ways: tuple[str, ...]
    run: Callable[[], Tensor]

    @property
    def name(self) -> str:
        """Question, shape and tokens."""
        return f"{self.question} {'x'.join(map(str, self.shape))} at {self.tokens}"


def contests(request: RaceRequest) -> Iterator[Contest]:
    """Yield the contests of a request; those with a single way are left out."""
    device, dtype = torch.device(request.device), getattr(torch, request.dtype)
    found: list[Iterator[Contest]] = []
    for N, K in request.linear:
        found.append(_products(device, dtype, N, K, request.tokens))
    chip = chip_of(device)
    if chip is not None:
        found += [_groups(device, dtype, sizes) for sizes in request.groups]
        found += [_experts(device, dtype, *sizes) for sizes in request.experts]
        if request.linear and not chip.no_matrix:
            widest = max(N for N, _ in request.linear)
            ranks = (rank for rank in (16, 32) if rank <= chip.one_pass_rank)
            found += [_gradients(device, dtype, widest, rank) for rank in ranks]
    for each in found:
        yield from (contest for contest in each if len(contest.ways) > 1)


def _products(
    device: torch.device, dtype: torch.dtype, N: int, K: int, most: int
) -> Iterator[Contest]:
    _, q = packed_on(device, N, K, True)
    for tokens in (t for t in _TOKENS if t <= most):
        x = randn(tokens, K).to(device, dtype)
        ways = tuple(_ways(device, dtype, tokens, N, K))
        run = partial(_without_gradients, nf4_linear, x, q, (N, K), None)
        yield Contest("product", (N, K), tokens, tokens, ways, run)


def _ways(device: torch.device, dtype: torch.dtype, tokens: int, N: int, K: int) -> Iterator[str]:
    """Yield the ways of x [tokens, K] times W [N, K] that exist here."""
    yield "dequantize"
    if chip_of(device) is None:
        if device.type == "cpu" and dtype == torch.bfloat16 and has_bf16_product((N, K), "nf4", 64):
            yield "bf16"
        return
    if fused_tokens(device, dtype, (N, K), 64) is not None and K % 64 == 0:
        yield "bitsandbytes"
    fits = tokens <= FEW_TOKENS or (
        dtype.itemsize == 2 and tokens <= 64 and not why_no_tile(device, tile_rows(tokens))
    )
    if fits and K % 8 == 0:
        yield "fused"
    if select_pairs(device, dtype, tokens, (N, K)).backend == "pairs":
        yield "pairs"


def _groups(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Iterator[Contest]:
    *rows, K = sizes
    layers = []
    for i, N in enumerate(rows):
        _, q = packed_on(device, N, K, True, seed=i)
        A, B = (randn(*s, seed=i).to(device, dtype) / 8 for s in ((_RANK, K), (N, _RANK)))
        layers.append(Projection(q, (N, K), None, A, B, 2.0))
    for tokens, limit in ((256, 512), (2048, ALWAYS)):
        x = randn(tokens, K).to(device, dtype)
        run = partial(_both_ways, x, layers, sizes)
        yield Contest("group", sizes, tokens, limit, ("apart", "grouped"), run)


def _both_ways(x: Tensor, layers: list[Projection], sizes: tuple[int, ...]) -> Tensor:
    """Run a group forward and backward as it is selected; return dX."""
    x = x.detach().requires_grad_()
    shapes = [(N, sizes[-1]) for N in sizes[:-1]]
    if select_group(x.device, x.dtype, x.shape[0], shapes).backend == "grouped":
        ys = nf4_grouped_projections(x, layers)
    else:
        ys = [nf4_lora_linear(x, p.q, p.shape, None, p.A, p.B, p.scaling) for p in layers]
    torch.autograd.backward(ys, ys)
    assert x.grad is not None
    return x.grad


def _experts(
    device: torch.device, dtype: torch.dtype, number: int, N: int, K: int
) -> Iterator[Contest]:
    number = min(number, _MOST_EXPERTS)
    each = [packed_on(device, N, K, True, seed=i)[1] for i in range(number)]
    parts = [torch.stack([_part(q, i).reshape(-1) for q in each]) for i in range(4)]
    q = Packed4bit(*parts)
    for rows in _EXPERT_ROWS:
        groups = Groups.counted([rows] * number, rows * number, device)
        X = randn(rows * number, K).to(device, dtype)
        run = partial(_without_gradients, nf4_grouped_linear, X, q, (N, K), groups)
        fits = dtype.itemsize == 2 and rows <= 64 and not why_no_tile(device, tile_rows(2 * rows))
        ways = ("dequantize", "fused") if fits else ("dequantize",)
        yield Contest("experts", (N, K), rows, rows, ways, run)


def _part(q: Packed4bit, position: int) -> Tensor:
    part = q[position]
    assert part is not None  # nested: every part is there
    return part


def _gradients(device: torch.device, dtype: torch.dtype, N: int, rank: int) -> Iterator[Contest]:
    dY, S, B = (randn(*s).to(device, dtype) for s in ((2048, N), (2048, rank), (N, rank)))

    def run() -> Tensor:
        dS, dB = rank_gradients(dY, S, B, 0.5)
        return torch.cat([dS.reshape(-1), dB.reshape(-1)])

    yield Contest("rank_gradients", (rank,), 2048, ALWAYS, ("torch", "triton"), run)


def _without_gradients(product: Callable[..., Tensor], *arguments: object) -> Tensor:
    with torch.no_grad():
        return product(*arguments)


def _force(device: torch.device, dtype: str, contest: Contest, way: str) -> None:
    """Have every selection of this contest's shape choose one way."""
    use_races(device, [Race(contest.question, dtype, contest.shape, ALWAYS, way, {way: 0.0})])


def race(request: RaceRequest) -> Iterator[tuple[Contest, str | Race]]:
    """Yield each contest with the name of a way before it runs, and with the result at the end."""
    device = torch.device(request.device)
    use_races(device, [])
    for contest in contests(request):
        if contest.name in request.done:
            continue
        allowed = [w for w in contest.ways if f"{contest.question} {w}" not in request.banned]
        want: Tensor | None = None
        right: list[str] = []
        force = partial(_force, device, request.dtype, contest)
        for way in allowed:
            yield contest, way
            before = set(FAILURES)
            force(way)
            got = contest.run()
            want = got if want is None else want  # the library's way comes first
            if not (set(FAILURES) - before or wrong_by(got, want)):
                right.append(way)
        if not right:
            continue
        ways = dict.fromkeys(right, contest.run)
        times = medians(ways, device, repeats=request.repeats, before=force)
        use_races(device, [])
        winner = min(times, key=lambda way: times[way])
        yield (
            contest,
            Race(contest.question, request.dtype, contest.shape, contest.limit, winner, times),
        )


def main(text: str) -> None:
    """Serve one request."""
    given = json.loads(text)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    for contest, found in race(RaceRequest(**given)):
        if isinstance(found, str):
            line: dict[str, object] = {"starts": [contest.question, found, contest.name]}
        else:
            line = {"done": contest.name, **asdict(found)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
