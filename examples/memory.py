"""Does it fit? Memory by part of four ways to fine-tune a model of 7 billion parameters.

Counted on the meta device from Mistral 7B's published sizes; nothing is loaded. CPU, a minute.
"""

from keeping import parser, show, table
from transformers import MistralConfig

from lightning_peft import LoRA, Plan, Quantization, estimate_memory

WAYS = {
    "full": {"method": "full"},
    "LoRA": {"method": LoRA(r=16)},
    "QLoRA": {"method": LoRA(r=16), "quantization": Quantization("nf4")},
    "QLoRA, 8-bit AdamW, checkpointing": {
        "method": LoRA(r=16),
        "quantization": Quantization("nf4"),
        "optimizer": "adamw_8bit",
        "checkpointing": True,
    },
}


def config(layers: int) -> MistralConfig:
    return MistralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, architectures=["MistralForCausalLM"],
    )  # fmt: skip


def parts_of(plans: dict[str, Plan]) -> list[str]:
    """Every part that some plan has, in order."""
    return list(dict.fromkeys(part for plan in plans.values() for part in plan.parts))


def picture(plans: dict[str, Plan]):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    left = dict.fromkeys(plans, 0.0)
    for part in parts_of(plans):
        widths = [plan.parts.get(part, 0) / 1e9 for plan in plans.values()]
        axes.barh(list(plans), widths, left=list(left.values()), label=part)
        left = {name: left[name] + w for name, w in zip(plans, widths, strict=True)}
    axes.invert_yaxis()
    axes.set(xlabel="GB, 10⁹ bytes")
    axes.legend(fontsize=7)
    return figure


def main(smoke: bool, keep: bool) -> dict[str, Plan]:
    layers = 2 if smoke else 32
    ways = dict(list(WAYS.items())[-1:] if smoke else WAYS)
    plans = {
        name: estimate_memory(config(layers), batch_size=2, sequence_length=1024, **choice)
        for name, choice in ways.items()
    }
    parts = parts_of(plans)
    rows = [
        (name, *(f"{plan.parts.get(p, 0) / 1e9:.2f}" for p in parts), f"{plan.peak / 1e9:.2f}")
        for name, plan in plans.items()
    ]
    text = table(["GB", *parts, "in all"], rows)
    show("Memory by part, 7 billion parameters", text, keep, picture(plans) if keep else None)
    return plans


if __name__ == "__main__":
    main(**vars(parser(__doc__).parse_args()))
