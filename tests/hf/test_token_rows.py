"""Trained token rows to and from Hugging Face peft, alone and beside LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, by_peft, in_peft, loaded, run, trained
from tests.hf.test_tied_weights import build as build_tied

FLOOR = 1e-5
IDS = [7, 3, 90]  # not ascending: the file's rows are in the order of the config


def models(name: str) -> tuple[nn.Module, dict[str, Tensor], str, list[str]]:
    """A tied model, or one with a head of its own, whose inputs hold the trained tokens."""
    if name == "untied llama":
        base, inputs = build("llama")
        embedding, targets = "embed_tokens", ["q_proj"]
    elif name == "gemma2":  # scales its embeddings
        base, inputs = build("gemma2")
        embedding, targets = "embed_tokens", ["q_proj"]
    else:
        base, inputs, embedding, targets = build_tied(name)
    inputs = {key: t.clone() for key, t in inputs.items()}
    for key in ("input_ids", "decoder_input_ids"):
        if key in inputs:
            inputs[key][:, 1:4] = torch.tensor(IDS)
    return base, inputs, embedding, targets


NAMES = ["llama", "untied llama", "gemma2", "gpt2", "t5"]


def check_both_ways(base: nn.Module, inputs: Any, theirs: nn.Module, path: Path) -> None:
    """peft's directory here, merged, and written again for peft."""
    want = run(theirs, inputs)
    assert not torch.equal(want, run(base, inputs)), "the adapter does nothing"
    model = loaded(base, path)
    assert_close("logits", run(model, inputs), want, floor=FLOOR)
    lp.save_adapter(model, path / "again")
    assert_close("again", run(in_peft(base, path / "again"), inputs), want, floor=FLOOR)
    assert_same_bits("ours", run(loaded(base, path / "again"), inputs), run(model, inputs))
    lp.merge(model)
    assert_close("merged", run(model, inputs), want, floor=FLOOR)
    lp.unmerge(model)
    lp.detach(model)
    assert_same_bits("detached", run(model, inputs), run(base, inputs))


@pytest.mark.sweep(0.6)
@pytest.mark.parametrize("name", NAMES)
def test_alone(name: str, tmp_path: Path) -> None:
    base, inputs, _, _ = models(name)
    theirs = by_peft(base, tmp_path, peft.TrainableTokensConfig, token_indices=IDS)
    check_both_ways(base, inputs, theirs, tmp_path)


@pytest.mark.sweep(0.4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["list", "dict"])
def test_beside_lora(name: str, form: str, tmp_path: Path) -> None:
    base, inputs, embedding, targets = models(name)
    ids: Any = IDS if form == "list" else {embedding: IDS}
    theirs = by_peft(base, tmp_path, r=2, target_modules=targets, trainable_token_indices=ids)
    check_both_ways(base, inputs, theirs, tmp_path)


@pytest.mark.sweep(0.5)
@pytest.mark.parametrize("name", ["llama", "untied llama", "gpt2"])
@pytest.mark.parametrize("head", ["same", "others"])
def test_embedding_and_head(name: str, head: str, tmp_path: Path) -> None:
    base, inputs, embedding, targets = models(name)
    ids = {embedding: IDS, "lm_head": IDS if head == "same" else [5, 2]}
    theirs = by_peft(base, tmp_path, r=2, target_modules=targets, trainable_token_indices=ids)
    check_both_ways(base, inputs, theirs, tmp_path)
    rows = [n for n, _ in loaded(base, tmp_path).named_parameters() if n.endswith(".rows")]
    assert len(rows) == (1 if head == "same" and name != "untied llama" else 2)


def test_the_config_of_peft_alone(tmp_path: Path, recwarn: Any) -> None:
    base, inputs, _, _ = models("untied llama")
    model = trained(base, lp.TrainableTokens(IDS))
    lp.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["token_indices"] == sorted(IDS)
    known = set(peft.TrainableTokensConfig().to_dict()) | {"auto_mapping"}
    assert not set(config) - known
    recwarn.clear()
    assert_close("peft", run(in_peft(base, tmp_path), inputs), run(model, inputs), floor=FLOOR)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def altered(path: Path, change: Any, config: Any = None) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if config is not None:
        stored = json.loads((path / "adapter_config.json").read_text())
        config(stored)
        (path / "adapter_config.json").write_text(json.dumps(stored))


KEY = "base_model.model.model.embed_tokens.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop(KEY), None, "missing .*embed_tokens.trainable_tokens_delta"),
        (lambda t: t.update({KEY: t[KEY][:2].clone()}), None, r"shape \[3, 32\], got \[2, 32\]"),
        (lambda t: t.update({HEAD: t[HEAD] + 1}), None, "lm_head: expected the rows of"),
        (lambda t: t.update({KEY + "x": t[KEY].clone()}), None, "extra"),
        (lambda t: None, lambda c: c.update(token_indices=[3, 3, 7]), r"\[3\] more than once"),
        (lambda t: None, lambda c: c.update(token_indices=[3, 7, 96]), r"size 96, got \[96\]"),
        (lambda t: None, lambda c: c.update(token_indices=["a", 1, 2]), "a list of whole numbers"),
        (lambda t: None, lambda c: c.update(target_modules=["wte"]), "matches none"),
    ],
)
def test_bad_files(change: Any, config: Any, message: str, tmp_path: Path) -> None:
    base, inputs, _, _ = models("llama")
    by_peft(base, tmp_path, peft.TrainableTokensConfig, token_indices=IDS)
    altered(tmp_path, change, config)
    before = run(base, inputs)
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(base, tmp_path)
    assert_same_bits("the model", run(base, inputs), before)
    assert not [n for n, _ in base.named_parameters() if "peft" in n]


class BiasedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_heads_whose_bias_peft_drops(tmp_path: Path) -> None:
    base = BiasedHead()
    by_peft(base, tmp_path, peft.TrainableTokensConfig, token_indices=[1], target_modules=["head"])
    with pytest.raises(ValueError, match="head without a bias"):
        lp.load_adapter(copy.deepcopy(base), tmp_path)
    lp.attach(base, lp.TrainableTokens([1], target_modules=["head"]))
    with pytest.raises(ValueError, match="head without a bias"):
        lp.save_adapter(base, tmp_path / "ours")


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    base, _, embedding, _ = models("llama")
    rows = trained(base, lp.TrainableTokens({embedding: [3], "lm_head": [5]}))
    with pytest.raises(ValueError, match="one list"):
        lp.save_adapter(rows, tmp_path)
    whole = copy.deepcopy(base)
    lp.attach(whole, lp.TrainableTokens([3]), modules_to_save=["norm"])
    with pytest.raises(ValueError, match="no modules_to_save"):
        lp.save_adapter(whole, tmp_path)
    loose = trained(base, lp.TrainableTokens([3], tied=False))
    with pytest.raises(ValueError, match=r"\['lm_head'\], tied to it"):
        lp.save_adapter(loose, tmp_path)


class TiedByHand(nn.Module):
    """Shares a weight without a config that says so: peft ties no rows here."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(99, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 99, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.inner(self.embedding(ids))))
        return y


def test_weights_that_are_tied_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, ids = TiedByHand().eval(), torch.tensor([[3, 7, 90, 5]])
    alone: dict[str, Any] = {"token_indices": IDS, "target_modules": ["embedding"]}
    theirs = by_peft(base, tmp_path / "alone", peft.TrainableTokensConfig, **alone)
    model = loaded(base, tmp_path / "alone")
    assert_close("peft here", model(ids), theirs(ids), floor=FLOOR)
    lp.save_adapter(model, tmp_path / "again")
    assert_close("ours in peft", in_peft(base, tmp_path / "again")(ids), theirs(ids), floor=FLOOR)
    tied = trained(base, lp.TrainableTokens(**alone))
    with pytest.raises(ValueError, match="tie_word_embeddings does not say so"):
        lp.save_adapter(tied, tmp_path / "tied")
    rows = {"trainable_token_indices": {"embedding": IDS}, "target_modules": ["inner"]}
    by_peft(base, tmp_path / "beside", r=2, **rows)
    with pytest.raises(ValueError, match="tie_word_embeddings does not say so"):
        lp.load_adapter(copy.deepcopy(base), tmp_path / "beside")


@pytest.mark.parametrize("ids", [{"embed_tokens": IDS}, {"embed_tokens": IDS, "lm_head": IDS}])
def test_weights_apart_under_a_config_that_ties(ids: Any, tmp_path: Path) -> None:
    """peft has the head read the rows nevertheless."""
    base = models("llama")[0]
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach() + 1)
    by_peft(base, tmp_path, r=2, target_modules=["q_proj"], trainable_token_indices=ids)
    with pytest.raises(ValueError, match=r"model.tie_weights\(\)|missing .*lm_head"):
        lp.load_adapter(copy.deepcopy(base), tmp_path)
    rows = trained(base, lp.TrainableTokens(ids))
    with pytest.raises(ValueError, match=r"call model.tie_weights\(\)"):
        lp.save_adapter(rows, tmp_path / "ours")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["copy", "copies", "embedding", "head"],
)
def test_ensure_weight_tying_where_peft_ignores_it(
    options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """Without config.tie_word_embeddings it has no effect, whatever the tensors are."""
    base, inputs, _, _ = models("untied llama")
    if tied:
        base.lm_head.weight = base.get_input_embeddings().weight
    theirs = by_peft(base, tmp_path, r=2, ensure_weight_tying=True, **options)
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), run(theirs, inputs), floor=FLOOR)
    lp.save_adapter(model, tmp_path / "again")
    again = in_peft(base, tmp_path / "again")
    assert_close("again", run(again, inputs), run(theirs, inputs), floor=FLOOR)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (lp.TrainableTokens(IDS), {}),
        (lp.LoRA(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]}), {}),
        (
            lp.LoRA(r=2, target_modules=["q_proj"]),
            {"modules_to_save": ["embed_tokens", "lm_head"], "separate_copies": True},
        ),
    ],
    ids=["rows", "head", "separate"],
)
def test_export_of_a_tied_model(method: Any, more: dict[str, Any], tmp_path: Path) -> None:
    base, inputs, _, _ = models("llama")
    model = trained(base, method, **more)
    lp.save_adapter(model, tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    lp.export_merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", dtype="float32")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_close("merged", run(merged, inputs), run(model, inputs), floor=FLOOR)
