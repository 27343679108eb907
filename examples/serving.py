"""One base, three adapters, one batch: each row is answered under its own adapter.

A small language model is pretrained here; three adapters are trained one after another for three
kinds of text and saved as Hugging Face directories. A server loads all of them onto one base and
answers a mixed batch in one pass. CPU, minutes.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from byte_model import LanguageModel, fit, split, texts
from keeping import parser, show, table
from torch import Tensor

from lightning_peft import (
    PEFT,
    LoRA,
    adapter_names,
    disable_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)

KINDS = "python", "names", "sums"


def train_adapter(base: LanguageModel, text: str, steps: int, directory: Path) -> None:
    pl.seed_everything(1)
    module = copy.deepcopy(base)
    data, _ = split(text, steps)
    lora = LoRA(r=8, alpha=16, target_modules="all-linear")
    fit(module, data, PEFT(lora, root="net", report=False))  # the file's names start at the net
    save_adapter(module.net, directory)


def losses(server: LanguageModel, rows: Tensor) -> Tensor:
    """One loss a row."""
    logits = server.net(input_ids=rows).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return each.mean(1)


def seconds(calls, times: int) -> list[float]:
    """Median of each; they take turns, so that both meet the same machine."""
    found = [[] for _ in calls]
    for _ in range(times):
        for own, call in zip(found, calls, strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in found]


@torch.no_grad()
def main(smoke: bool, keep: bool) -> dict[str, float]:
    pretrain, steps, rows = (4, 3, 2) if smoke else (300, 120, 8)
    pl.seed_everything(0)
    known = texts()
    base = LanguageModel(*((32, 1) if smoke else (96, 3)))
    with torch.enable_grad():
        fit(base, split(known["prose"], pretrain)[0])
    server = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            with torch.enable_grad():
                train_adapter(base, known[kind], steps, Path(folder) / kind)
            load_adapter(server.net, Path(folder) / kind, adapter_name=kind)
    server.eval()

    requests = torch.cat([split(known[kind], 1)[1][:rows] for kind in (*KINDS, "prose")])
    names = [kind for kind in (*KINDS, "__base__") for _ in range(rows)]

    def mixed() -> Tensor:
        set_adapter(server, KINDS)  # adapters named by row must be active
        with adapter_names(names):
            return losses(server, requests)

    def one_by_one() -> Tensor:
        answers = []
        for i, kind in enumerate(KINDS):
            set_adapter(server, kind)
            answers.append(losses(server, requests[i * rows : (i + 1) * rows]))
        with disable_adapters(server):
            return torch.cat([*answers, losses(server, requests[-rows:])])

    together, apart = mixed(), one_by_one()
    difference = (together - apart).abs().max().item()
    assert difference < 1e-4, difference
    times = 3 if smoke else 30
    of_mixed, of_passes = seconds((mixed, one_by_one), times)
    ratio = of_mixed / of_passes
    with disable_adapters(server):
        plain = losses(server, requests)
    means = [losses.view(-1, rows).mean(1).tolist() for losses in (plain, together)]
    shown = [
        (name, f"{before:.3f}", f"{after:.3f}")
        for name, before, after in zip((*KINDS, "prose, no adapter"), *means, strict=True)
    ]
    text = table(["rows", "loss under the base", "loss in the mixed batch"], shown) + (
        f"\n\nOne mixed batch of {len(requests)} rows takes {ratio:.2f} of the time of four "
        f"passes, one an adapter; its losses differ from theirs by at most {difference:.0e}."
    )
    show("Several adapters served from one base", text, keep)
    return {"difference": difference, "ratio": ratio}


if __name__ == "__main__":
    main(**vars(parser(__doc__).parse_args()))
