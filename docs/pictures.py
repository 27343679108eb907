"""Draws the site's pictures, light and dark, from committed data.

    python docs/pictures.py           # docs/figures/*.svg
    python docs/pictures.py --plans   # first count docs/results/memory_models.csv with the planner

Each picture has a file that ends in `-light.svg` and one that ends in `-dark.svg`. The numbers come
from benchmarks/results, docs/results and `lightning_peft.guideline`; nothing is typed in here.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
FIGURES = DOCS / "figures"
PLANS = DOCS / "results" / "memory_models.csv"
REPORT = DOCS / "results" / "report.txt"
RESULTS = DOCS.parent / "benchmarks" / "results"


class Theme(NamedTuple):
    """Colours of one mode: the site's background and text, and a series that both show well."""

    name: str
    back: str
    panel: str
    text: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#f4f5f7", "#1f2430", "#9aa0ab",
    ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5", "#c2255c", "#0c8599", "#868e96"),
)  # fmt: skip
DARK = Theme(
    "dark", "#1e2129", "#282c37", "#e6e8ee", "#7a8190",
    ("#748ffc", "#ff922b", "#51cf66", "#da77f2", "#f783ac", "#3bc9db", "#adb5bd"),
)  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- plain SVG


def how_it_works(theme: Theme) -> str:
    """Return five steps, from freezing to merging."""
    steps = [
        ("1  Freeze", ("the model that", "your code built"), "fp32 / bf16"),
        ("2  Pack", ("linear layers,", "layer by layer"), "4 bits"),
        ("3  Attach", ("adapters in place,", "same names"), "+ 1 % trained"),
        ("4  Checkpoint", ("what was trained,", "never the base"), "megabytes"),
        ("5  Merge", ("the library's own", "classes and keys"), "deploy"),
    ]
    width, height, gap = 172, 132, 26
    parts = []
    for i, (title, lines, foot) in enumerate(steps):
        x, color = 8 + i * (width + gap), theme.series[i]
        parts.append(
            f'<rect x="{x}" y="8" width="{width}" height="{height}" rx="10" fill="{theme.panel}" '
            f'stroke="{color}" stroke-width="2"/>'
        )
        parts.append(_text(x + 14, 38, title, theme.text, 18, "600"))
        parts += [_text(x + 14, 66 + 21 * j, s, theme.text, 15) for j, s in enumerate(lines)]
        parts.append(_text(x + 14, 124, foot, color, 15, "600"))
        if i:
            parts.append(
                f'<path d="M{x - gap + 3} 74 h{gap - 10} m-6 -6 l6 6 l-6 6" fill="none" '
                f'stroke="{theme.faint}" stroke-width="2.5"/>'
            )
    return _svg(8 + len(steps) * (width + gap) - gap + 8, height + 16, parts)


def report(theme: Theme) -> str:
    """Return the report of the README's script as a terminal window."""
    lines = REPORT.read_text("utf-8").rstrip().splitlines()
    size, step = 14, 20
    width = 48 + round(0.62 * size * max(map(len, lines)))
    height = 64 + step * len(lines)
    parts = [
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10" '
        f'fill="{theme.panel}" stroke="{theme.faint}"/>'
    ]
    parts += [
        f'<circle cx="{24 + 20 * i}" cy="22" r="6" fill="{c}"/>'
        for i, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    ]
    parts += [
        _text(24, 60 + step * i, line, theme.text, size, mono=True) for i, line in enumerate(lines)
    ]
    return _svg(width, height, parts)


def _text(
    x: float, y: float, text: str, color: str, size: int, weight: str = "400", mono: bool = False
) -> str:
    family = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, sans-serif"
    return (
        f'<text x="{x}" y="{y}" fill="{color}" font-family="{family}" font-size="{size}" '
        f'font-weight="{weight}" xml:space="preserve">{escape(text)}</text>'
    )


def _svg(width: int, height: int, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">\n{body}\n</svg>\n'
    )


# ---- plots


def memory(theme: Theme, axes: Any) -> None:
    """Draw memory by part for three sizes of model and three ways to fine-tune."""
    found = rows(PLANS)
    parts = [p for p in found[0] if p.endswith("_gb") and p != "total_gb"]
    labels = [f"{r['model']}, {r['way']}" for r in found]
    left = [0.0] * len(found)
    for part, color in zip(parts, theme.series, strict=False):
        widths = [float(r[part]) / float(r["total_gb"]) * 100 for r in found]
        name = part.removesuffix("_gb").replace("_", " ")
        axes.barh(labels, widths, left=left, color=color, label=name, height=0.72)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, r in enumerate(found):
        axes.text(101, i, f"{float(r['total_gb']):,.0f} GB", va="center", color=theme.text)
    axes.invert_yaxis()
    axes.set(xlim=(0, 114), xlabel="share of the memory of one rank, %; total at the right")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def step_time(theme: Theme, axes: Any) -> None:
    """Draw the time of a training step relative to peft's, with the control's range."""
    found = {
        r["method"]: float(r["ratio"])
        for r in rows(RESULTS / "method_steps.csv")
        if r["candidate"] == "lightning_peft"
    }
    for r in rows(RESULTS / "lora_step.csv"):
        if r["base"] == "nf4" and r["candidate"] == "lightning_peft":
            found["QLoRA (bitsandbytes)"] = float(r["ratio"])
    names = sorted(found, key=lambda n: found[n], reverse=True)
    axes.axvspan(0.97, 1.03, color=theme.faint, alpha=0.35, lw=0, label="peft against itself")
    axes.barh(names, [found[n] for n in names], color=theme.series[0], height=0.66)
    for i, n in enumerate(names):
        axes.text(found[n] + 0.01, i, f"{found[n]:.2f}", va="center", color=theme.text)
    axes.set(xlim=(0, 1.15), xlabel="time of a step over peft's (less is faster); CPU")
    axes.legend(loc="lower right", frameon=False, bbox_to_anchor=(1.0, 1.0))


def quality(theme: Theme, axes: Any, task: str) -> None:
    """Draw the distance to full fine-tuning over trained parameters, with 95 % intervals."""
    from lightning_peft.guideline.measurements import MEASURED

    found = [m for m in MEASURED if m.task == task]
    for m in found:
        color = theme.series[0] if m.tied else theme.faint
        span = [[max(0.0, m.to_full - m.low)], [max(0.0, m.high - m.to_full)]]
        axes.errorbar(m.percent, m.to_full, yerr=span, fmt="o", ms=4, color=color, lw=1)
    for m in found:
        if m.variant in _NAMED:
            axes.annotate(
                m.variant, (m.percent, m.to_full), xytext=(5, 5), textcoords="offset points",
                fontsize=8, color=theme.text,
            )  # fmt: skip
    axes.axhline(0, color=theme.series[1], lw=1)
    first = found[0]
    axes.set(
        xscale="log", xlabel="trained parameters, % of the model",
        ylabel=f"{first.score_name}: difference to full fine-tuning",
    )  # fmt: skip


_NAMED = {
    *("LoRA", "DoRA", "IA3", "LoHa", "VeRA", "BitFit", "Bottleneck, Houlsby", "PromptTuning"),
    *("OFT", "LastLayers", "NormTuning", "PrefixTuning"),
}


def what_fits(theme: Theme, axes: Any) -> None:
    """Draw GB per GPU of QLoRA runs: a panel per number of GPUs, bars by model and context."""
    found = [r for r in rows(RESULTS / "what_fits.csv") if r["options"] != "published"]
    bars = list(dict.fromkeys((r["model"], int(r["tokens"])) for r in found))
    models = list(dict.fromkeys(model for model, _ in bars))
    places = [i + models.index(model) for i, (model, _) in enumerate(bars)]  # a gap per model
    names = {"checkpoint": "checkpointing", "limits": "with offload and a chunked loss"}
    cards = (24, 48, 80, 141)  # GB
    panels = zip(axes, dict.fromkeys(r["gpus"] for r in found), strict=True)
    for panel, gpus in panels:
        for (options, name), color in zip(
            names.items(), (theme.series[6], theme.series[0]), strict=True
        ):
            heights = {
                (r["model"], int(r["tokens"])): float(r["gpu_gb"])
                for r in found
                if (r["gpus"], r["options"]) == (gpus, options)
            }
            panel.bar(places, [heights[bar] for bar in bars], 0.85, color=color, label=name)
        for size in cards:
            panel.axhline(size, color=theme.faint, lw=0.8, ls=":")
        labels = [f"{tokens // 1024}k" for _, tokens in bars]
        for model in models:
            own = [i for i, bar in enumerate(bars) if bar[0] == model]
            labels[own[len(own) // 2]] += f"\n{model}"
        panel.set(yscale="log", ylim=(2, 1000), title="1 GPU" if gpus == "1" else f"{gpus} GPUs")
        panel.set_xticks(places, labels, fontsize=8)
        panel.set_yticks([2, 5, 10, 100, 1000], ["2", "5", "10", "100", "1000"])
        panel.minorticks_off()
    for size in cards:
        axes[-1].text(places[-1] + 1.3, size, f"{size} GB card", fontsize=8, va="center",
                      color=theme.text)  # fmt: skip
    axes[0].set_ylabel("GB per GPU; context below")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                          ncols=2, frameon=False)  # fmt: skip


def plot(
    draw: Callable[[Theme, Any], None], size: tuple[float, float], panels: int = 1
) -> Callable[[Theme], str]:
    """Return a function that draws one axes, or a row of axes, as SVG."""

    def drawn(theme: Theme) -> str:
        import io

        import matplotlib
        from matplotlib.figure import Figure

        colors = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), theme.text),
            **dict.fromkeys(("xtick.color", "ytick.color"), theme.text),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.back),
            "svg.hashsalt": "lightning_peft",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
        }
        with matplotlib.rc_context(colors):
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots(1, panels, sharey=True)
            draw(theme, axes)
            for each in figure.axes:
                each.spines[["top", "right"]].set_visible(False)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()

    return drawn


PICTURES: dict[str, Callable[[Theme], str]] = {
    "how-it-works": how_it_works,
    "report": report,
    "memory-models": plot(memory, (8.6, 4.6)),
    "what-fits": plot(what_fits, (11, 4), panels=3),
    "step-time": plot(step_time, (7.6, 9.6)),
    "quality-classification": plot(lambda t, a: quality(t, a, "classification"), (7.6, 4.6)),
    "quality-language": plot(lambda t, a: quality(t, a, "language"), (7.6, 4.6)),
}


# ---- data of the planner


def write_plans() -> None:
    """Count the memory of three sizes of Llama with full fine-tuning, LoRA and QLoRA."""
    from transformers import LlamaConfig

    from lightning_peft import LoRA, estimate_memory

    common = {"vocab_size": 128256, "architectures": ["LlamaForCausalLM"]}
    shapes = {
        "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
               "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
        "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                "num_attention_heads": 64, "num_key_value_heads": 8},
        "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                 "num_attention_heads": 128, "num_key_value_heads": 8},
    }  # fmt: skip
    lora = LoRA(r=16, target_modules="all-linear")
    ways: dict[str, dict[str, Any]] = {
        "full": {"method": "full"},
        "LoRA": {"method": lora},
        "QLoRA": {"method": lora, "quantization": "nf4"},
    }
    groups = {
        "weights_gb": ("base weights", "fully trained weights", "adapters"),
        "gradients_gb": ("gradients",),
        "optimizer_state_gb": ("optimizer state",),
        "activations_gb": ("activations", "backward"),
        "logits_and_loss_gb": ("logits and loss",),
        "buffers_gb": ("dequantise buffers", "communication buckets"),
    }
    found = []
    for model, shape in shapes.items():
        for way, choice in ways.items():
            plan = estimate_memory(
                LlamaConfig(**{**common, **shape}), batch_size=1, sequence_length=2048,
                checkpointing=True, **choice,
            )  # fmt: skip
            parts = {k: sum(plan.parts.get(n, 0) for n in v) / 1e9 for k, v in groups.items()}
            known = {n for v in groups.values() for n in v}
            assert not {n for n, b in plan.parts.items() if b and n not in known}, plan.parts
            line = {"model": model, "way": way, **{k: f"{v:.2f}" for k, v in parts.items()}}
            line["total_gb"] = f"{sum(parts.values()):.2f}"
            line["trained"] = str(plan.trainable)
            line["settings"] = "batch 1, 2048 tokens, checkpointing, AdamW, bf16 base"
            line["date"] = datetime.date.today().isoformat()
            found.append(line)
            print(line, flush=True)
    with PLANS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def main() -> None:
    """Write every picture in both modes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", action="store_true", help="count the memory plans first")
    if parser.parse_args().plans:
        write_plans()
    FIGURES.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        for theme in (LIGHT, DARK):
            (FIGURES / f"{name}-{theme.name}.svg").write_text(draw(theme), "utf-8")
            print(f"{name}-{theme.name}.svg")


if __name__ == "__main__":
    main()
