"""A language model of English goes to three other kinds of text; what does it cost the first?

Pretrained here, byte by byte, on the prose of Python's help. For each other kind of text: LoRA, and
everything trained. The table has the loss on the new text and what is left of the old one; with
LoRA the old model is there as before when the adapter is switched off. CPU, minutes.
"""

import copy

import lightning.pytorch as pl
from byte_model import LanguageModel, fit, loss, split, texts
from keeping import parser, show, table

from lightning_peft import PEFT, LoRA, disable_adapters

LORA = LoRA(r=8, alpha=16, target_modules="all-linear")


def adapt(base: LanguageModel, data, lr: float, *callbacks: pl.Callback) -> LanguageModel:
    pl.seed_everything(1)
    module = copy.deepcopy(base)
    module.lr, module.losses = lr, []
    fit(module, data, *callbacks)
    return module


def picture(curves: dict[str, list[float]]):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name, losses in curves.items():
        smooth = [sum(losses[i : i + 10]) / 10 for i in range(0, len(losses) - 9, 10)]
        style = "--" if name.endswith("full") else "-"
        axes.plot(range(10, 10 * len(smooth) + 1, 10), smooth, style, label=name)
    axes.set(xlabel="step", ylabel="training loss, nats a byte")
    axes.legend()
    return figure


def main(smoke: bool, keep: bool) -> list[tuple]:
    pretrain, steps = (4, 3) if smoke else (400, 150)
    pl.seed_everything(0)
    data = {name: split(text, steps) for name, text in texts().items()}
    english, prose = split(texts()["prose"], pretrain)
    base = LanguageModel(*((32, 1) if smoke else (96, 3)))
    fit(base, english)
    before, rows, curves = loss(base, prose), [], {}
    for name in ("python",) if smoke else ("python", "names", "sums"):
        train, held_out = data[name]
        lora = adapt(base, train, 3e-3, PEFT(LORA, report=False))
        full = adapt(base, train, 1e-3)
        with disable_adapters(lora):
            off = loss(lora, prose)
        assert off == before, "with the adapter off the base must be what it was"
        losses = [loss(m, held_out) for m in (base, lora, full)]
        left = [loss(m, prose) for m in (lora, full)]
        rows.append((name, *(f"{v:.3f}" for v in (*losses, *left, off))))
        curves |= {f"{name}, LoRA": lora.losses, f"{name}, full": full.losses}
    columns = ["loss on", "base", "LoRA", "full", "prose: LoRA", "prose: full", "prose: LoRA off"]
    text = table(columns, rows) + (
        f"\n\nNats a byte on text not trained on. Prose before: {before:.3f}. Pretrained for "
        f"{pretrain} steps, adapted for {steps}; one seed."
    )
    show("A language model across domains", text, keep, picture(curves) if keep else None)
    return rows


if __name__ == "__main__":
    main(**vars(parser(__doc__).parse_args()))
