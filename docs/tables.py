"""MkDocs hook: a line `<!-- table: NAME -->` becomes a table made from the numbers' own files.

No number of a benchmark is typed into a page by hand; where its file is missing the page says so.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ECOSYSTEM = ROOT / "tests" / "ecosystem" / "results.csv"
MISSING = "*not measured*"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill the page's tables in."""
    return re.sub(r"^<!-- table: (\w+) -->$", lambda m: TABLES[m[1]](), markdown, flags=re.M)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _read(name: str) -> list[dict[str, str]]:
    return _rows(RESULTS / f"{name}.csv")


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _origin(rows: list[dict[str, str]], *fields: str) -> str:
    said = [", ".join(sorted({r[f] for r in rows if r.get(f)})) for f in fields]
    return "\n\n" + "; ".join(s for s in said if s) + "."


def compare_methods() -> str:
    """One table a task: mean score over the seeds, its spread, what is trained, the peak."""
    rows = _read("compare_methods")
    if not rows:
        return MISSING
    parts = []
    for task in dict.fromkeys(r["task"] for r in rows):
        here = [r for r in rows if r["task"] == task]
        lines = []
        for method in dict.fromkeys(r["method"] for r in here):
            runs = [r for r in here if r["method"] == method]
            scores = [float(r["score"]) for r in runs]
            spread = (max(scores) - min(scores)) / 2
            lines.append(
                [
                    method,
                    f"{statistics.mean(scores):.2f} ± {spread:.2f}"
                    if len(runs) > 1
                    else f"{scores[0]:.2f}",
                    str(len(runs)),
                    f"{float(runs[0]['percent']):.3g}",
                    f"{statistics.median(float(r['peak_mb']) for r in runs):.0f}",
                ]
            )
        columns = ["", here[0]["score_name"], "seeds", "trained, %", "peak, MB"]
        parts.append(f"**{task}**\n\n{_table(columns, lines)}")
    return "\n\n".join(parts) + _origin(rows, "command", "device", "date")


def planner() -> str:
    """Predicted against measured peak."""
    rows = _read("planner")
    lines = [
        [r["case"], r["precision"], r["predicted_mb"], r["measured_mb"], r["ratio"]] for r in rows
    ]
    columns = ["", "precision", "predicted, MB", "measured, MB", "ratio"]
    return _table(columns, lines) + _origin(rows, "command", "device", "date") if rows else MISSING


def step_memory() -> str:
    """What checkpointing, offload and the chunked loss keep, and what they cost."""
    rows = _read("step_memory")
    lines = [
        [r["options"], r["step_mb"], r["planned_mb"], r["moved_mb"], r["cpu_ms"], r["loss"]]
        for r in rows
    ]
    columns = ["options", "step, MB", "planned, MB", "moved, MB", "processor, ms", "loss"]
    return _table(columns, lines) + _origin(rows, "command", "device", "date") if rows else MISSING


def guideline() -> str:
    """What the literature recommends, from the data that `recommend` filters."""
    from lightning_peft.guideline.guideline import GUIDELINE

    lines = [
        [
            a.method,
            ", ".join(a.tasks),
            f"{a.budget:g} %",
            "yes" if a.latency else "no",
            a.why,
            a.source,
        ]
        for a in GUIDELINE
    ]
    return _table(["", "tasks", "trained", "merges", "what was found", "source"], lines)


def methods() -> str:
    """Every registered method and the first line of its docstring."""
    from lightning_peft.methods.registry import METHODS

    lines = [
        [f"`{name}`", (cls.__doc__ or "").strip().splitlines()[0]]
        for name, cls in sorted((c.__name__, c) for c in METHODS.values())
    ]
    return _table(["class", "what it is"], lines)


def versions() -> str:
    """Pinned versions, from constraints.txt."""
    pins = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    return _table(["package", "tested with"], [list(p) for p in pins])


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
    return _table(["script", "results"], lines)


def bench() -> str:
    """Lines of `lightning-peft bench`, as users sent them."""
    from lightning_peft.diagnostics.bench_report import BenchResult, markdown_table

    path = RESULTS / "bench.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    results = [BenchResult.read(line) for line in lines if line.strip()]
    return markdown_table(results) if results else MISSING


def ecosystem() -> str:
    """Packages whose modules were trained by `tests/ecosystem/run.py`."""
    rows = _rows(ECOSYSTEM)
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
    return _table(columns, lines) + _origin(rows, "date") if rows else MISSING


def chat_tokens() -> str:
    """Trained parameters and memory of new tokens, by the planner."""
    import lightning_peft as lp

    sizes = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    layers = ["q_proj", "v_proj"]
    tied = {"ensure_weight_tying": True}
    choices: dict[str, tuple[lp.LoRA, list[str]]] = {
        "LoRA alone": (lp.LoRA(target_modules=layers), []),
        "and 4 rows": (lp.LoRA(target_modules=layers, trainable_token_indices=[1, 2, 3, 4]), []),
        "and LoRA on the embedding": (
            lp.LoRA(target_modules=[*layers, "embed_tokens"], **tied),
            [],
        ),
        "and a copy of the table": (lp.LoRA(target_modules=layers), ["embed_tokens", "lm_head"]),
    }
    lines = []
    for label, (method, saved) in choices.items():
        plan = lp.estimate_memory(sizes, method, modules_to_save=saved)
        lines.append([label, f"{plan.trainable:,}", f"{plan.resident / 1e9:.2f}"])
    return _table(["", "trained parameters", "weights, gradients and AdamW, GB"], lines)


def _trained(row: dict[str, str]) -> str:
    if not row["adapted"]:
        return row["train"]
    packed = f", {row['packed']} packed" if row["storage"] == "nf4" else ""
    still = "" if row["train"] == "trained" else f"; {row['train']}"
    return f"{row['adapted']} layers{packed}{still}"


def _joined(rows: list[dict[str, str]], stage: str) -> str:
    return "; ".join(dict.fromkeys(r[stage].replace("not reached", "–") for r in rows))


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        *(compare_methods, planner, step_memory, guideline, methods, versions),
        *(gpu, bench, ecosystem, chat_tokens),
    )
}
