"""Tables of what the package itself knows: methods, targets, settings, versions."""

from __future__ import annotations

import re

from table_format import ROOT, origin, read, table

__all__ = [
    "chat_tokens",
    "compare_methods",
    "default_targets",
    "defaults",
    "guideline",
    "methods",
    "versions",
]


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
        parts.append(f"### {task}, {own[0].protocol}\n\n{table(columns, lines)}")
    return "\n\n".join(parts) + origin(read("compare_methods"), "device", "date")


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
    return table(columns, lines)


def guideline() -> str:
    """What the literature recommends, from the data that `recommend` filters."""
    from lightning_peft.guideline.advice import GUIDELINE

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
    return table(["", "tasks", "trained", "merges", "what was found", "source"], lines)


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
    return table(["class", "what it is"], lines)


def default_targets() -> str:
    """Layers that `target_modules=None` picks, by architecture."""
    from lightning_peft.models.target_table import FAMILIES, MODEL_TYPES

    lines = []
    for family in FAMILIES.values():
        types = sorted(t for t, f in MODEL_TYPES.items() if f == family)
        if types:
            names = [", ".join(f"`{s}`" for s in row) for row in (family.lora, family.ia3)]
            lines.append([", ".join(types), *names])
    return table(["model types", "LoRA and most methods", "IA3, BEFT"], lines)


def versions() -> str:
    """Pinned versions, from constraints.txt."""
    pins = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    return table(["package", "tested with"], [list(p) for p in pins])


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
    return table(["", "trained parameters", "weights, gradients and AdamW, GB"], lines)
