"""The table of architectures against transformers: every row's layers exist where it is used."""

import pytest
import torch
from torch import nn

from lightning_peft.layers import adaptable
from lightning_peft.models.target_modules import select
from lightning_peft.models.target_table import FAMILIES, MODEL_TYPES

transformers = pytest.importorskip("transformers")

_SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
}
#: One of a family in the default run.
QUICK = ("llama", "mixtral", "bert", "t5", "bart", "segformer", "mpnet", "persimmon")


def on_meta(model_type: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    config = CONFIG_MAPPING[model_type]()
    known = config.to_dict()
    small = {k: v for k, v in _SMALL.items() if isinstance(known.get(k), int)}
    kinds = known.get("layer_types") or known.get("layers_block_type")
    if kinds or known.get(
        "attn_layer_period"
    ):  # layers differ: one of each kind must be among them
        small = {k: v for k, v in small.items() if k == "vocab_size"}
    try:
        config = CONFIG_MAPPING[model_type](**small)
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except Exception as error:  # a part that is no model of its own, or defaults that don't build
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")


def check(model_type: str) -> None:
    model = on_meta(model_type)
    for kind in ("lora", "ia3"):
        found = select(model, None, adaptable=adaptable, kind_hint=kind)
        assert found.names, kind
    leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if adaptable(m)}
    missing = [s for s in MODEL_TYPES[model_type].lora if s.rpartition(".")[2] not in leaves]
    assert len(missing) < len(MODEL_TYPES[model_type].lora), missing


@pytest.mark.parametrize("model_type", QUICK)
def test_rows(model_type: str) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - set(QUICK)))
def test_every_row(model_type: str) -> None:
    check(model_type)


def test_no_family_is_left_over() -> None:
    used = {id(family) for family in MODEL_TYPES.values()}
    assert [name for name, family in FAMILIES.items() if id(family) not in used] == []
