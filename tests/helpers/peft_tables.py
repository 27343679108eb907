"""The tables of configurations in peft's own tests, and what exchange does with each row.

peft's wheel has no tests; its sdist has. A row names a model and a configuration. peft adapts the
model, the adapter goes through a directory into our copy of the model, and from there through
another directory back into peft.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.tiny_models import BUILDERS, KINDS, example_inputs, main_output

__all__ = ["Result", "TableCase", "namespace_of", "run_case", "table_cases"]

_ENCODERS = ("bert", "roberta", "deberta", "deberta_v2")
TOLERANCE = 1e-4
SMALLEST_EFFECT = 1e-3

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class TableCase:
    """One row of a table.

    Attributes:
        table: Name of the test file.
        name: Name of the row.
        model: Name of the model.
        build: Builds the base; always the same weights.
        inputs: Builds the batch.
        kind: Class of peft's configuration.
        options: Its arguments.
    """

    table: str
    name: str
    model: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    kind: Callable[..., Any]
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """Table, model and row."""
        return f"{self.table}: {self.model}: {self.name}"


@dataclass(frozen=True)
class Result:
    """What became of a row.

    Attributes:
        case: The row.
        verdict: "pass", "refused on reading", "refused on writing", "wrong", "crash", "no effect",
            or "not in peft" if peft itself raises.
        reason: The message, or the difference.
        peft_itself: How peft disagrees with itself on this row; "" if it does not.
    """

    case: TableCase
    verdict: str
    reason: str = ""
    peft_itself: str = ""


# ---- the tables


def namespace_of(file: Path) -> dict[str, Any]:
    """Run a test file's tables, models and helper functions; leave its tests out."""
    names: dict[str, Any] = {"__name__": f"peft_tables_{file.stem}"}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        name = getattr(node, "name", "")
        if name.lower().startswith("test"):
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        code = compile(ast.Module([node], []), str(file), "exec")
        with contextlib.suppress(ImportError, NameError):
            exec(code, names)
    return names


def table_cases(folder: Path) -> Iterator[TableCase]:
    """Yield every row of the tables in a folder of peft's tests."""
    yield from _custom(folder)
    language = {
        "test_decoder_models": ("opt", "gpt2", "gptj", "llama", "qwen2", "gemma3"),
        "test_encoder_decoder_models": ("t5", "bart"),
        "test_feature_extraction_models": tuple(f"{m}_features" for m in _ENCODERS),
        "test_seq_classifier": ("bert", "roberta", "llama_classifier"),
    }
    for table, models in language.items():
        rows = namespace_of(folder / f"{table}.py")["ALL_CONFIGS"]
        for model in models:
            yield from (_of_language(table, i, model, *row) for i, row in enumerate(rows))
    heads = namespace_of(folder / "test_token_classification_qa.py")
    for rows, head in (("TOKEN_CLS_CONFIGS", "tokens"), ("QA_CONFIGS", "answers")):
        for model in (f"bert_{head}", f"roberta_{head}"):
            yield from (
                _of_language(rows.lower(), i, model, *row) for i, row in enumerate(heads[rows])
            )
    for i, (model, *row) in enumerate(
        namespace_of(folder / "test_target_parameters.py")["ALL_CONFIGS"]
    ):
        ours = "llama4_text" if "Llama4" in model else "gpt_oss"
        yield _of_language("test_target_parameters", i, ours, *row)
    for name, config in namespace_of(folder / "test_vision_models.py")["CONFIGS"].items():
        yield TableCase(
            "test_vision_models",
            name,
            "resnet",
            _builder("resnet"),
            lambda: {"pixel_values": torch.randn(2, 3, 32, 32, generator=_seeded())},
            lambda config=config: copy.deepcopy(config),
            {},
        )


def _custom(folder: Path) -> Iterator[TableCase]:
    names = namespace_of(folder / "test_custom_models.py")
    for name, model, kind, options in names["TEST_CASES"]:
        yield TableCase(
            "test_custom_models",
            name,
            model,
            lambda model=model: names["MockTransformerWrapper"].from_pretrained(model),
            lambda: {"X": torch.arange(90).view(9, 10)},
            kind,
            options,
        )


def _of_language(
    table: str, index: int, model: str, kind: Callable[..., Any], options: dict[str, Any]
) -> TableCase:
    name = f"{index} {getattr(kind, '__name__', kind)}"
    return TableCase(
        table, name, model, _builder(model), lambda: _language_inputs(model), kind, dict(options)
    )


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _builder(model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(7)
        return MORE[model][1]() if model in MORE else BUILDERS[model]()

    return build


def _language_inputs(model: str) -> Inputs:
    known = MORE[model][0] if model in MORE else model
    inputs = dict(example_inputs(known))
    labels = inputs.pop("labels")
    if KINDS[known] == "encoder_decoder":
        inputs["decoder_input_ids"] = labels
    inputs["input_ids"][:, 3] = 1  # a token that aLoRA's rows wait for
    return inputs


def _of(
    known: str, cls: str, config: str = "", **fields: Any
) -> tuple[str, Callable[[], nn.Module]]:
    """Return (model whose inputs it takes, builder of the class over its configuration)."""

    def build() -> nn.Module:
        if config:
            described = getattr(transformers, config)(**_SIZES, **fields)
        else:
            described = BUILDERS[known]().config
            for field, value in fields.items():
                setattr(described, field, value)
        built: nn.Module = getattr(transformers, cls)(described)
        return built.eval()

    return known, build


_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_WITH_PLACES: dict[str, Any] = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
}

#: Models that the tables need beyond `tiny_models`.
MORE: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "gptj": _of("gpt2", "GPTJForCausalLM", "GPTJConfig", rotary_dim=4),
    "gemma3": _of(
        "llama", "Gemma3ForCausalLM", "Gemma3TextConfig", num_key_value_heads=2, head_dim=8
    ),
    "bert_features": _of("bert", "BertModel"),
    "roberta_features": _of("roberta", "RobertaModel"),
    "deberta_features": _of("bert", "DebertaModel", "DebertaConfig", **_WITH_PLACES),
    "deberta_v2_features": _of("bert", "DebertaV2Model", "DebertaV2Config", **_WITH_PLACES),
    "llama_classifier": _of("llama", "LlamaForSequenceClassification"),
    "bert_tokens": _of("bert", "BertForTokenClassification"),
    "roberta_tokens": _of("roberta", "RobertaForTokenClassification"),
    "bert_answers": _of("bert", "BertForQuestionAnswering", num_labels=2),
    "roberta_answers": _of("roberta", "RobertaForQuestionAnswering", num_labels=2),
}


# ---- one row


def output_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the tensor that two runs are compared by."""
    with torch.no_grad():
        output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], -1)
    if hasattr(output, "last_hidden_state") and not hasattr(output, "logits"):
        hidden: Tensor = output.last_hidden_state
        return hidden
    return main_output(output)


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; inf for other shapes or non-finite values.

    peft's logits include the positions of a prompt: the last ones count.
    """
    if got.ndim == 3 and want.ndim == 3:
        length = min(got.shape[1], want.shape[1])
        got, want = got[:, -length:], want[:, -length:]
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(1e-6))


def perturb(model: nn.Module, std: float) -> None:
    """Move every trained tensor, and statistics of trained copies, away from the start."""
    g = torch.Generator().manual_seed(3)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    statistics = [
        (n, b)
        for n, b in model.named_buffers()
        if "modules_to_save" in n and n.endswith(("running_mean", "running_var"))
    ]
    with torch.no_grad():
        for _, t in sorted(trained + statistics, key=lambda item: item[0]):
            move = (
                torch.randn(t.shape, generator=g).to(t)
                * std
                * max(1.0, float(t.std()) if t.numel() > 1 else 1.0)
            )
            t.add_(move.abs() if t.requires_grad is False else move)


def run_case(case: TableCase) -> Result:
    """Exchange one row in both directions and compare the outputs."""
    inputs = case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = case.build().eval()
        plain = output_of(base, inputs)
        try:
            torch.manual_seed(1)
            theirs = peft.get_peft_model(copy.deepcopy(base), case.kind(**case.options)).eval()
            for std in (0.02, 0.1, 0.3, 1.0):
                perturb(theirs, std)
                want = output_of(theirs, inputs)
                effect = difference(want, plain)
                if effect > SMALLEST_EFFECT:
                    break
        except Exception as error:  # whatever peft raises: the row is none
            return Result(case, "not in peft", f"{type(error).__name__}: {str(error)[:200]}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("always")
        return _exchange(case, base, theirs, inputs, want, effect, Path(folder))


def _exchange(
    case: TableCase,
    base: nn.Module,
    theirs: nn.Module,
    inputs: Inputs,
    want: Tensor,
    effect: float,
    folder: Path,
) -> Result:
    theirs.save_pretrained(str(folder / "theirs"))
    model = copy.deepcopy(base)

    def result(verdict: str, reason: str = "") -> Result:
        itself = (
            ""
            if verdict in ("pass", "no effect")
            else _peft_itself(base, theirs, folder, inputs, want)
        )
        return Result(case, verdict, reason, itself)

    try:
        lp.load_adapter(model, folder / "theirs")
    except ValueError as error:
        return result("refused on reading", str(error))
    except Exception as error:
        return result("crash", f"load_adapter: {type(error).__name__}: {error}")
    try:
        got = output_of(model.eval(), inputs)
    except Exception as error:
        return result("crash", f"forward: {type(error).__name__}: {error}")
    if (error := difference(got, want)) > TOLERANCE:
        return result("wrong", f"reading: {error:.2g} off, effect {effect:.2g}")
    try:
        lp.save_adapter(model, folder / "ours")
    except ValueError as error:
        return result("refused on writing", str(error))
    except Exception as error:
        return result("crash", f"save_adapter: {type(error).__name__}: {error}")
    try:
        again, messages = _in_peft(base, folder / "ours")
        _, usual = _in_peft(base, folder / "theirs")
    except Exception as error:
        return result("wrong", f"peft cannot read it: {type(error).__name__}: {error}")
    if more := messages - usual:
        return result("wrong", f"peft warns: {sorted(more)}")
    if (error := difference(output_of(again, inputs), want)) > TOLERANCE:
        return result("wrong", f"writing: {error:.2g} off, effect {effect:.2g}")
    return result("pass" if effect > SMALLEST_EFFECT else "no effect", f"effect {effect:.2g}")


def _in_peft(base: nn.Module, folder: Path) -> tuple[nn.Module, set[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model: nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    told = {str(w.message) for w in caught if issubclass(w.category, UserWarning)}
    return model, told


def _peft_itself(
    base: nn.Module, theirs: nn.Module, folder: Path, inputs: Inputs, want: Tensor
) -> str:
    """How peft's reload or merge differs from peft's forward."""
    found = []
    try:
        again, _ = _in_peft(base, folder / "theirs")
        if (error := difference(output_of(again, inputs), want)) > TOLERANCE:
            found.append(f"reloaded {error:.2g} off")
    except Exception as error:
        found.append(f"reload raises {type(error).__name__}: {str(error)[:80]}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = copy.deepcopy(theirs).merge_and_unload()
        if (error := difference(output_of(merged, inputs), want)) > TOLERANCE:
            found.append(f"merged {error:.2g} off")
    except Exception as error:
        found.append(f"merge raises {type(error).__name__}: {str(error)[:80]}")
    return "; ".join(found)
