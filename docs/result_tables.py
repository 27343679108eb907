"""Tables of results: benchmarks, plans, and packages that were tried."""

from __future__ import annotations

import statistics

from table_format import ECOSYSTEM, MISSING, RESULTS, origin, read, read_rows, table

__all__ = [
    "bench",
    "context_parallel",
    "ecosystem",
    "gpu",
    "large_base",
    "planner",
    "protocol",
    "published_memory",
    "step_memory",
    "step_times",
    "token_rows",
    "what_fits",
]


def protocol() -> str:
    """Rows of the held-out protocol that have been run so far, with intervals and verdicts."""
    from benchmarks.compare.intervals import paired

    runs = [r for r in read("compare_runs") if r["score"]]
    margins = {"language": (0.01, False)}
    lines = []
    for task in dict.fromkeys(r["task"] for r in runs):
        scores: dict[str, dict[int, float]] = {}
        for r in runs:
            if r["task"] == task:
                scores.setdefault(r["row"], {})[int(r["seed"])] = float(r["score"])
        reference = scores.get("full, same layers", {})
        for row, own in scores.items():
            mean = statistics.mean(own.values())
            gap = paired(own, reference)
            share, higher = margins.get(task, (1.0, True))
            margin = share if higher else share * statistics.mean(reference.values() or [0.0])
            cells = [task, row, f"{mean:.2f}", str(len(own))]
            if gap is None or row == "full, same layers":
                cells += ["", "reference" if row == "full, same layers" else ""]
            else:
                verdict = gap.verdict(margin, higher)
                cells += [f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]", verdict]
            lines.append(cells)
    columns = ["task", "row", "test score", "seeds", "difference to full, same layers", "verdict"]
    return table(columns, lines) + origin(runs, "device", "date") if lines else MISSING


def step_times() -> str:
    """Time of a training step over peft's, method by method."""
    rows = read("method_steps")
    control = {r["method"]: r["ratio"] for r in rows if r["candidate"] == "peft again"}
    lines = [
        [r["method"], r["hidden"], r["ratio"], control.get(r["method"], "")]
        for r in rows
        if r["candidate"] == "lightning_peft"
    ]
    lines += [
        ["QLoRA against peft + bitsandbytes", r["hidden"], r["ratio"], ""]
        for r in read("lora_step")
        if r["base"] == "nf4" and r["candidate"] == "lightning_peft"
    ]
    columns = ["method", "width", "step time over peft's", "peft against itself"]
    return table(columns, lines) if lines else MISSING


def planner() -> str:
    """Predicted against measured peak."""
    rows = read("planner")
    lines = [
        [r["case"], r["precision"], r["predicted_mb"], r["measured_mb"], r["ratio"]] for r in rows
    ]
    columns = ["", "precision", "predicted, MB", "measured, MB", "ratio"]
    return table(columns, lines) + origin(rows, "command", "device", "date") if rows else MISSING


def step_memory() -> str:
    """What checkpointing, offload and the chunked loss keep, and what they cost."""
    rows = read("step_memory")
    lines = [
        [r["options"], r["step_mb"], r["planned_mb"], r["moved_mb"], r["cpu_ms"], r["loss"]]
        for r in rows
    ]
    columns = ["options", "step, MB", "planned, MB", "moved, MB", "processor, ms", "loss"]
    return table(columns, lines) + origin(rows, "command", "device", "date") if rows else MISSING


def what_fits() -> str:
    """GB per GPU by model, number of GPUs and context."""
    rows = [r for r in read("what_fits") if r["options"] != "published"]
    if not rows:
        return MISSING
    lengths = list(dict.fromkeys(r["tokens"] for r in rows))
    lines = []
    for key in dict.fromkeys((r["model"], r["gpus"], r["options"]) for r in rows):
        here = [r for r in rows if (r["model"], r["gpus"], r["options"]) == key]
        lines.append([f"{key[0]}, {key[1]} GPU, {key[2]}", *(_on_card(r) for r in here)])
    columns = ["GB per GPU", *(f"{int(n) // 1024}k tokens" for n in lengths)]
    return table(columns, lines) + origin(rows, "command", "date")


def large_base() -> str:
    """A base of 3 GB on the ranks of one machine: what is read, held and sent."""
    rows = read("large_base")
    lines = [
        [
            r["ranks"],
            r["read_mb"],
            r["held_mb"],
            f"{r['load_mb']} ({r['load_ideal_mb']})",
            f"{r['step_mb']} ({r['planned_mb']})",
            f"{r['gathered_mb']} ({r['gathered_ideal_mb']})",
            f"{r['reduced_mb']} ({r['reduced_ideal_mb']})",
        ]
        for r in rows
    ]
    columns = ["ranks", "read, MB", "held, MB", "load (held + 2 layers)", "step (planned)"]
    columns += ["gathered per step (ideal)", "reduced (ideal)"]
    return table(columns, lines) + origin(rows, "command", "device", "date") if rows else MISSING


def context_parallel() -> str:
    """Bytes per rank of a step when ranks share a sequence."""
    rows = read("context_parallel")
    lines = [
        [r["ranks"], r["first_rank_mb"], r["last_rank_mb"], r["planned_mb"], r["loss"]]
        for r in rows
    ]
    columns = ["ranks", "first rank, MB", "last rank, MB", "planned, MB", "loss"]
    return table(columns, lines) + origin(rows, "command", "device", "date") if rows else MISSING


def _on_card(row: dict[str, str]) -> str:
    return row["gpu_gb"] if row["card"] == "-" else f"{row['gpu_gb']} ({row['card']} card)"


def published_memory() -> str:
    """Plans beside figures that other projects published."""
    rows = [r for r in read("what_fits") if r["options"] == "published"]
    lines = [[r["model"], r["published_gb"], r["gpu_gb"], r["source"]] for r in rows]
    columns = ["setting", "published, GB", "planned, GB", "source"]
    return table(columns, lines) if rows else MISSING


def gpu() -> str:
    """Benchmarks that need a GPU: which of them have results."""
    measured = {
        "kernel_ops": ("linear_layers", "bandwidth"), "small_batch": ("decode",),
        "training": ("training",), "optimizer": ("optimizer",), "experts": ("experts",),
    }  # fmt: skip
    lines = []
    for script, tables in measured.items():
        files = sorted(p.name for t in tables for p in RESULTS.glob(f"*_{t}.csv"))
        found = ", ".join(f"`benchmarks/results/{name}`" for name in files)
        lines.append([f"`benchmarks/gpu/{script}.py`", found or MISSING])
    return table(["script", "results"], lines)


def bench() -> str:
    """Lines of `lightning-peft bench`, as users sent them."""
    from lightning_peft.diagnostics.bench_report import BenchResult, markdown_table

    path = RESULTS / "bench.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    results = [BenchResult.read(line) for line in lines if line.strip()]
    return markdown_table(results) if results else MISSING


def ecosystem() -> str:
    """Packages whose modules were trained by `tests/ecosystem/run.py`."""
    rows = read_rows(ECOSYSTEM)
    lines = []
    for package, model in dict.fromkeys((r["package"], r["model"]) for r in rows):
        here = [r for r in rows if (r["package"], r["model"]) == (package, model)]
        first = here[0]
        besides = f"`{first['argument']}`" if first["argument"] else ""
        lines.append(
            [
                f"{package} {first['version']}".strip(),
                model,
                first["lightning"],
                first["entry"],
                *(_trained(r) for r in here),
                *[""] * (2 - len(here)),
                *(_joined(here, stage) for stage in ("resume", "predict", "merge")),
                " ".join(filter(None, (besides, first["remark"]))),
            ]
        )
    columns = ["package", "model", "Lightning package", "entry point", "LoRA", "LoRA over NF4"]
    columns += ["resumed", "loaded, predicts", "merged, predicts", "given besides, or reason"]
    return table(columns, lines) + origin(rows, "date") if rows else MISSING


def token_rows() -> str:
    """Step time and peak of a step with trained token rows, over peft's."""
    rows = read("token_rows")
    lines = []
    for key in dict.fromkeys((r["trained"], r["tied"]) for r in rows):
        own = {r["candidate"]: r for r in rows if (r["trained"], r["tied"]) == key}
        ours, theirs = own["lightning_peft"], own["peft"]
        label = f"{key[0]}, {'tied' if key[1] == 'True' else 'separate head'}"
        times = [ours["ratio"], own["peft again"]["ratio"]]
        lines.append([label, *times, ours["peak_mb"], theirs["peak_mb"], ours["state_bytes"]])
    columns = ["trained", "step time over peft's", "peft's over peft's", "peak, MB", "peft's"]
    columns += ["AdamW's moments, bytes"]
    if not rows:
        return MISSING
    return table(columns, lines) + origin(rows, "command", "device", "machine", "date")


def _trained(row: dict[str, str]) -> str:
    if not row["adapted"]:
        return row["train"]
    packed = f", {row['packed']} packed" if row["storage"] == "nf4" else ""
    still = "" if row["train"] == "trained" else f"; {row['train']}"
    return f"{row['adapted']} layers{packed}{still}"


def _joined(rows: list[dict[str, str]], stage: str) -> str:
    return "; ".join(dict.fromkeys(r[stage].replace("not reached", "–") for r in rows))
