"""The methods that are compared, and the learning rates that their trials try.

`rates` are the centres of a method's grid: one for the tasks with an encoder, one for language.
Every row has the same number of trials, `FACTORS` times the centre, on validation data. Methods of
several tasks run with one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning_peft as lp
from benchmarks.compare.tasks import Task
from benchmarks.compare.tasks.base import HEAD_RATE
from lightning_peft.methods import GatedLoRA, mam, unipelt
from lightning_peft.methods.base import Method, WeightMethod

__all__ = ["FACTORS", "LEFT_OUT", "ROWS", "Row", "learning_rates", "methods_of"]

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: Its id in the CSV files.
        method: The method or hybrid. It is None if the row is a reference or a peer.
        rates: Centres of the learning-rate grids: encoder tasks, language.
        nf4: If True, the frozen base is packed to 4 bits.
        embeddings: If True, embeddings and output layer are trained too; tasks without are skipped.
        reference: What a row without a method trains: everything, the weights that low-rank methods
            adapt, or the head.
        peer: The run in Hugging Face peft instead, over bitsandbytes for ``"qlora"``.
        front: If True, ten seeds on four tasks; else five seeds on the text task.
    """

    name: str
    method: Method | tuple[Method, ...] | None
    rates: tuple[float, float]
    nf4: bool = False
    embeddings: bool = False
    reference: Literal["full", "same layers", "head"] | None = None
    peer: Literal["lora", "qlora", "dora", "ia3"] | None = None
    front: bool = False


def learning_rates(row: Row, task: str) -> list[float]:
    """Return the trials of a row on a task, the centre first."""
    centre = row.rates[task == "language"]
    return [float(f"{centre * f:.3g}") for f in sorted(FACTORS, key=lambda f: abs(f - 1))]


_LORA: dict[str, Any] = {"r": 8, "alpha": 16.0}
#: Layers that lead into an attention or a feed-forward block, by the names of all tasks.
_INWARD = ["query", "key", "value", "q_proj", "k_proj", "v_proj", "fc1"]
ROWS: tuple[Row, ...] = (
    Row("full, same layers", None, (2e-4, 2e-3), reference="same layers", front=True),
    Row("full fine-tuning", None, (2e-4, 2e-3), reference="full", front=True),
    Row("head only", None, (HEAD_RATE, 5e-3), reference="head"),
    # augmenting weights
    Row("LoRA", lp.LoRA(**_LORA), (2e-3, 1e-2), front=True),
    Row("LoRA, rank-stabilised", lp.LoRA(r=8, alpha=8.0, use_rslora=True), (2e-3, 1e-2)),
    Row("LoRA, gaussian", lp.LoRA(**_LORA, init="gaussian"), (2e-3, 1e-2)),
    Row("LoRA, orthogonal", lp.LoRA(**_LORA, init="orthogonal"), (2e-3, 1e-2)),
    Row("LoRA, PiSSA", lp.LoRA(**_LORA, init="pissa"), (1e-3, 4e-3)),
    Row("LoRA, OLoRA", lp.LoRA(**_LORA, init="olora"), (1e-3, 4e-3)),
    Row("LoRA, EVA", lp.LoRA(**_LORA, init="eva"), (5e-4, 1e-2)),
    Row("LoRA, LoRA-GA", lp.LoRA(**_LORA, init="lora_ga"), (1e-3, 4e-3)),
    Row("LoRA, CorDA", lp.LoRA(**_LORA, init="corda"), (1e-3, 4e-3)),
    Row("VeLoRA", lp.VeLoRA(**_LORA, groups=16), (2e-3, 1e-2)),
    Row("MonteCLoRA", lp.MonteCLoRA(**_LORA), (2e-3, 1e-2)),
    Row("Lily", lp.Lily(r=16, stride=2, n=2), (4e-3, 1e-2)),
    Row("Poly", lp.Poly(r=8, tasks=1, skills=4), (4e-3, 1e-2)),
    Row("LoRA on NF4", lp.LoRA(**_LORA), (2e-3, 1e-2), nf4=True, front=True),
    Row("LoRA, embeddings and head", lp.LoRA(**_LORA), (2e-3, 1e-2), embeddings=True),
    # the same run by other libraries, on the same seeds
    Row("peft: LoRA", None, (2e-3, 1e-2), peer="lora", front=True),
    Row("peft and bitsandbytes: QLoRA", None, (2e-3, 1e-2), peer="qlora", front=True),
    Row("peft: DoRA", None, (2e-3, 1e-2), peer="dora"),
    Row("peft: IA3", None, (2e-2, 5e-2), peer="ia3"),
    Row("LoRA on NF4, LoftQ", lp.LoRA(**_LORA, init="loftq"), (2e-3, 1e-2), nf4=True),
    Row("LoRA+", lp.LoRAPlus(**_LORA, ratio=16.0), (4e-4, 2e-3), front=True),
    Row("DoRA", lp.DoRA(**_LORA), (2e-3, 1e-2), front=True),
    Row("AdaLoRA", lp.AdaLoRA(init_r=12, target_r=8, alpha=24.0), (4e-3, 1e-2)),
    Row("LoHa", lp.LoHa(r=8, alpha=16.0), (4e-3, 2e-2)),
    Row("LoKr", lp.LoKr(r=8, alpha=16.0), (2e-3, 1e-2)),
    Row("VeRA", lp.VeRA(r=256), (2e-2, 5e-2)),
    Row("IA3", lp.IA3(), (2e-2, 5e-2), front=True),
    Row("IA3, added", lp.IA3(mode="add"), (5e-3, 2e-2)),
    Row("BEFT", lp.BEFT(), (5e-3, 2e-2)),
    Row("OFT", lp.OFT(block_size=32), (2e-3, 1e-2)),
    Row("BOFT", lp.BOFT(block_size=4, n_butterfly=2), (4e-3, 2e-2)),
    Row("MiSS", lp.MiSS(r=16), (1e-3, 4e-3)),
    Row("MiSS, bat", lp.MiSS(r=16, form="bat"), (1e-3, 4e-3)),
    Row("MiSS, mini", lp.MiSS(r=32, mini_r=8, form="mini"), (1e-3, 4e-3)),
    Row("LoRA-FA", lp.LoRA(**_LORA, freeze_A=True), (4e-3, 2e-2)),
    Row("LoRA, MiCA", lp.LoRA(**_LORA, init="mica"), (4e-3, 2e-2)),
    Row("LoRA, Riemannian", lp.LoRA(**_LORA, precondition=True), (1e-3, 4e-3)),
    Row("KaSA", lp.KaSA(**_LORA), (2e-3, 1e-2)),
    Row(
        "BD-LoRA",
        lp.BDLoRA(**_LORA, nblocks=2, match_strict=False, blocks_b=_INWARD),
        (2e-3, 1e-2),
    ),
    Row("HRA", lp.HRA(r=8), (2e-3, 1e-2)),
    Row("RoAd", lp.RoAd(), (4e-3, 2e-2)),
    Row("DeLoRA", lp.DeLoRA(r=8), (4e-3, 2e-2)),
    Row("GraLoRA", lp.GraLoRA(r=8, alpha=16.0), (2e-3, 1e-2)),
    Row("HiRA", lp.HiRA(r=8), (4e-3, 2e-2)),
    Row("PEANuT", lp.PEANuT(r=8), (2e-3, 1e-2)),
    Row("SHiRA", lp.SHiRA(r=8), (2e-3, 1e-2)),
    Row("Super-Tuning", lp.SuperTuning(sparsity=0.97), (2e-3, 1e-2)),
    Row("Supra", lp.SuperTuning(sparsity=0.99, r=4, alpha=8.0), (2e-3, 1e-2)),
    Row("VB-LoRA", lp.VBLoRA(r=4, vector_length=64), (1e-2, 4e-2)),
    Row("UniLoRA", lp.UniLoRA(r=4), (1e-2, 4e-2)),
    Row("TinyLoRA", lp.TinyLoRA(r=2), (1e-2, 4e-2)),
    Row("RandLoRA", lp.RandLoRA(r=32), (1e-4, 4e-4)),
    Row("PVeRA", lp.PVeRA(r=256), (2e-2, 5e-2)),
    Row("C3A", lp.C3A(block_size=64), (4e-2, 2e-1)),
    Row("FourierFT", lp.FourierFT(n_frequency=1000, zero_start=True), (4e-2, 1e-1)),
    Row("WaveFT", lp.WaveFT(n_frequency=2592), (4e-3, 2e-2)),
    Row("PSOFT", lp.PSOFT(r=32), (2e-3, 1e-2)),
    Row("DEFT", lp.DEFT(r=8), (2e-3, 1e-2)),
    Row("GLoRA", lp.GLoRA(r=8), (2e-3, 1e-2)),
    Row("AdaMSS", lp.AdaMSS(r=64), (4e-3, 2e-2)),
    Row("OSF", lp.OSF(), (2e-4, 2e-3)),
    # new layers
    Row(
        "Bottleneck, Houlsby",
        lp.BottleneckAdapter("houlsby", 4, init="bert"),
        (3e-3, 1e-2),
        front=True,
    ),
    Row(
        "Bottleneck, Pfeiffer",
        lp.BottleneckAdapter("pfeiffer", 1, ln_before=True, init="bert"),
        (2e-3, 1e-2),
    ),
    Row("Bottleneck, parallel", lp.BottleneckAdapter("parallel", init="bert"), (1e-3, 3e-3)),
    # in the sequence
    Row("PromptTuning", lp.PromptTuning(n=10), (2e-2, 1e-1)),
    Row("MultitaskPrompt", lp.MultitaskPrompt(n=10, tasks=1, ranks=1), (2e-2, 1e-1)),
    Row("PromptTuning, added", lp.PromptTuning(n=20, mode="add"), (5e-4, 3e-2)),
    Row("HardPrompt", lp.HardPrompt(n=10), (1e-2, 1e-2)),
    Row("PTuning, MLP", lp.PTuning(n=10, encoder="mlp", hidden=128), (2e-3, 1e-2)),
    Row("PTuning, LSTM", lp.PTuning(n=10, encoder="lstm", hidden=128), (2e-3, 1e-2)),
    Row("PrefixTuning", lp.PrefixTuning(n=10), (3e-2, 1e-1)),
    Row("Cartridge", lp.Cartridge(n=10, init="zero"), (3e-2, 1e-1)),
    Row("PrefixTuning, projection", lp.PrefixTuning(n=10, projection=True), (3e-3, 1e-2)),
    # hybrid
    Row("MAM", tuple(mam(n=10, hidden=128)), (1e-3, 4e-3)),
    Row("UniPELT", tuple(unipelt(n=10, hidden=128)), (2e-3, 1e-2)),
    # selective
    Row("BitFit", lp.BitFit(), (4e-3, 1e-2)),
    Row("NormTuning", lp.NormTuning(), (4e-3, 1e-2)),
    Row("LastLayers", lp.LastLayers(1), (5e-4, 2e-3)),
    Row("DiffPruning", lp.DiffPruning(density=0.05, l0=1e-2), (5e-4, 2e-3)),
)

#: Methods without a row → why no task here can compare them.
LEFT_OUT = {
    "AdaptionPrompt": "it takes the attention of GPT-2, Llama, Mistral and Qwen 2; no task has one",
    "ALoRA": "it acts behind invocation tokens, which the tasks' texts do not have",
    "Arrow": "it routes between adapters that were trained on other data, and trains nothing",
    "CPT": "it starts from examples with a format; the tasks have none",
    "ModulesToSave": "it is part of other rows",
    "QuantAwareLoRA": "it is LoRA until the base is rounded at the end",
    "SparseLoRA": "it is LoRA at another sparsity of B",
    "TrainableTokens": "the tasks have no new tokens",
    "TrainedBias": "it is part of other rows",
    "XLoRA": "it mixes adapters that were trained on other data",
}


def methods_of(row: Row, task: Task) -> list[Method]:
    """Return the row's methods on the layers of a task: the same layers for all that take some."""
    given = row.method if isinstance(row.method, tuple) else (row.method,)
    return [_placed(m, task) for m in given if m is not None]


def _placed(method: Method, task: Task) -> Method:
    if isinstance(method, lp.IA3) and method.mode == "multiply":
        return method  # its paper's: keys, values and the way out of the feed-forward block
    if isinstance(method, GatedLoRA):
        return method  # its paper's: queries and values
    if isinstance(method, WeightMethod):
        return replace(method, target_modules=list(task.targets))
    return method
