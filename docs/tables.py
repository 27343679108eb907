"""MkDocs hook: a line `<!-- table: NAME -->` becomes a table made from the numbers' own files, and
`# include PATH` in a code block becomes that file.

No number of a benchmark is typed into a page by hand; where its file is missing the page says so.
"""

from __future__ import annotations

import csv
import re
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ECOSYSTEM = ROOT / "tests" / "ecosystem" / "results.csv"
MISSING = "*not measured*"


def on_config(config: Any) -> Any:
    """Show the version, and the edit links if the repository is set."""
    source = (ROOT / "lightning_peft" / "__init__.py").read_text("utf-8")
    (number,) = re.findall(r'^__version__ = "(.+?)"', source, re.M)
    config.copyright = f"lightning_peft {number}"
    config.edit_uri = "edit/main/docs/" if config.repo_url else None
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Put the benchmarks' CSV files next to the pages, under data/."""
    from mkdocs.structure.files import File

    for path in sorted(RESULTS.glob("*.csv")):
        files.append(File.generated(config, f"data/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fill in the page's tables and included files."""
    markdown = re.sub(r"^( *)# include ([\w./-]+)$", _included, markdown, flags=re.M)
    return re.sub(r"^<!-- table: (\w+) -->$", lambda m: TABLES[m[1]](), markdown, flags=re.M)


def _included(match: re.Match[str]) -> str:
    return textwrap.indent((ROOT / match[2]).read_text("utf-8").rstrip(), match[1])


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table: columns of numbers to the right, columns of text to the left."""
    sides = [
        "---:" if i and rows and all(_is_number(row[i]) for row in rows) else ":---"
        for i in range(len(columns))
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, sides, *rows])


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+±≤\d.,:%\s]*", cell) is not None


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
    """One table per task of the published comparison: score, interval to full, size, rate."""
    from lightning_peft.guideline.measurements import MEASURED

    parts = []
    for task in dict.fromkeys(m.task for m in MEASURED):
        own = [m for m in MEASURED if m.task == task]
        lines = [
            [
                m.variant,
                f"{m.score:.1f}",
                f"{m.to_full:+.1f} [{m.low:+.1f}, {m.high:+.1f}]",
                str(m.seeds),
                f"{m.percent:.3g}",
                f"{m.peak_mb:.0f}",
                "" if m.step_ms is None else f"{m.step_ms:.0f}",
                f"{m.learning_rate:g}",
                "yes" if m.tied else "",
            ]
            for m in own
        ]
        columns = ["row", own[0].score_name, "difference to full, 95 % interval", "seeds"]
        columns += ["trained, %", "peak, MB", "step, ms", "learning rate", "tied with the best"]
        parts.append(f"### {task}, {own[0].protocol}\n\n{_table(columns, lines)}")
    return "\n\n".join(parts) + _origin(_read("compare_methods"), "device", "date")


def protocol() -> str:
    """Rows of the held-out protocol that have been run so far, with intervals and verdicts."""
    from benchmarks.compare.intervals import paired

    runs = [r for r in _read("compare_runs") if r["score"]]
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
    return _table(columns, lines) + _origin(runs, "device", "date") if lines else MISSING


def defaults() -> str:
    """Settings per method: the measured ones, their rate relative to full, and the literature's."""
    from lightning_peft.guideline.literature import SETTINGS
    from lightning_peft.guideline.measurements import MEASURED

    lines = []
    for variant in dict.fromkeys(m.variant for m in MEASURED):
        own = {m.task: m for m in MEASURED if m.variant == variant}
        cells = [variant, f"`{next(iter(own.values())).settings}`"]
        for task in ("classification", "language"):
            m = own.get(task)
            cells.append("" if m is None else f"{m.rate_to_full:g} × ({m.learning_rate:g})")
        cells.append(SETTINGS.get(variant, ""))
        lines.append(cells)
    columns = ["row", "settings", "rate over full's: classification", "language", "literature"]
    return _table(columns, lines)


def step_times() -> str:
    """Time of a training step over peft's, method by method."""
    rows = _read("method_steps")
    control = {r["method"]: r["ratio"] for r in rows if r["candidate"] == "peft again"}
    lines = [
        [r["method"], r["hidden"], r["ratio"], control.get(r["method"], "")]
        for r in rows
        if r["candidate"] == "lightning_peft"
    ]
    lines += [
        ["QLoRA against peft + bitsandbytes", r["hidden"], r["ratio"], ""]
        for r in _read("lora_step")
        if r["base"] == "nf4" and r["candidate"] == "lightning_peft"
    ]
    columns = ["method", "width", "step time over peft's", "peft against itself"]
    return _table(columns, lines) if lines else MISSING


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


def what_fits() -> str:
    """GB per GPU by model, number of GPUs and context."""
    rows = [r for r in _read("what_fits") if r["options"] != "published"]
    if not rows:
        return MISSING
    lengths = list(dict.fromkeys(r["tokens"] for r in rows))
    lines = []
    for key in dict.fromkeys((r["model"], r["gpus"], r["options"]) for r in rows):
        here = [r for r in rows if (r["model"], r["gpus"], r["options"]) == key]
        lines.append([f"{key[0]}, {key[1]} GPU, {key[2]}", *(_on_card(r) for r in here)])
    columns = ["GB per GPU", *(f"{int(n) // 1024}k tokens" for n in lengths)]
    return _table(columns, lines) + _origin(rows, "command", "date")


def large_base() -> str:
    """A base of 3 GB on the ranks of one machine: what is read, held and sent."""
    rows = _read("large_base")
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
    return _table(columns, lines) + _origin(rows, "command", "device", "date") if rows else MISSING


def context_parallel() -> str:
    """Bytes per rank of a step when ranks share a sequence."""
    rows = _read("context_parallel")
    lines = [
        [r["ranks"], r["first_rank_mb"], r["last_rank_mb"], r["planned_mb"], r["loss"]]
        for r in rows
    ]
    columns = ["ranks", "first rank, MB", "last rank, MB", "planned, MB", "loss"]
    return _table(columns, lines) + _origin(rows, "command", "device", "date") if rows else MISSING


def _on_card(row: dict[str, str]) -> str:
    return row["gpu_gb"] if row["card"] == "-" else f"{row['gpu_gb']} ({row['card']} card)"


def published_memory() -> str:
    """Plans beside figures that other projects published."""
    rows = [r for r in _read("what_fits") if r["options"] == "published"]
    lines = [[r["model"], r["published_gb"], r["gpu_gb"], r["source"]] for r in rows]
    columns = ["setting", "published, GB", "planned, GB", "source"]
    return _table(columns, lines) if rows else MISSING


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
    """Every public method and the first line of its docstring."""
    import lightning_peft
    from lightning_peft.methods.registry import METHODS

    known = {c.__name__: c for c in METHODS.values()}
    lines = [
        [f"[`{n}`](methods.md#{n.lower()})", (known[n].__doc__ or "").strip().splitlines()[0]]
        for n in sorted(known, key=str.lower)
        if n in lightning_peft.__all__
    ]
    return _table(["class", "what it is"], lines)


def default_targets() -> str:
    """Layers that `target_modules=None` picks, by architecture."""
    from lightning_peft.models.target_table import FAMILIES, MODEL_TYPES

    lines = []
    for family in FAMILIES.values():
        types = sorted(t for t, f in MODEL_TYPES.items() if f == family)
        if types:
            names = [", ".join(f"`{s}`" for s in row) for row in (family.lora, family.ia3)]
            lines.append([", ".join(types), *names])
    return _table(["model types", "LoRA and most methods", "IA3, BEFT"], lines)


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


def token_rows() -> str:
    """Step time and peak of a step with trained token rows, over peft's."""
    rows = _read("token_rows")
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
    return _table(columns, lines) + _origin(rows, "command", "device", "machine", "date")


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
        *(compare_methods, protocol, defaults, step_times, planner, step_memory, guideline),
        *(methods, default_targets, versions, gpu, bench, ecosystem, chat_tokens),
        *(what_fits, published_memory, token_rows, large_base, context_parallel),
    )
}
