"""Layer names of transformers 4: read, strictly, and written.

The names in `TABLE` are those that transformers 4.57.6 gives the layers of the same models; here
they are the oracle, and no rule of transformers 5 makes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import by_peft, loaded, trained

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8, "num_labels": 3,
}  # fmt: skip
IMAGE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
BLOCK = {  # of a ViT and what was modelled on it
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
VIT = {("layers.{}." + new): ("encoder.layer.{}." + old) for new, old in BLOCK.items()}
DINO = {
    ("encoder.layer.{}." + new): ("encoder.layer.{}." + old)
    for new, old in BLOCK.items()
    if "attention" in new
}
SWIN = {
    ("encoder.layers.{}.blocks.{}." + new): (
        "encoder.layers.{}.blocks.{}." + old.replace("attention.attention", "attention.self")
    )
    for new, old in BLOCK.items()
}
SEGFORMER = {
    "stages.{}.patch_embeddings.proj": "encoder.patch_embeddings.{}.proj",
    **{
        ("stages.{}.blocks.{}.attention." + new): ("encoder.block.{}.{}.attention." + old)
        for new, old in {
            "q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value",
            "o_proj": "output.dense",
            "sequence_reduction.sequence_reduction": "self.sr",
        }.items()
    },
    "stages.{}.blocks.{}.mlp.fc1": "encoder.block.{}.{}.mlp.dense1",
    "stages.{}.blocks.{}.mlp.fc2": "encoder.block.{}.{}.mlp.dense2",
}  # fmt: skip
TOWER = {"encoder.layers.{}." + n: "vision_model.encoder.layers.{}." + n for n in (
    *(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2",
)}  # fmt: skip


def within(prefix: str, table: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{new}": f"{prefix}.{old}" for new, old in table.items()}


def vision(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tr, model)(getattr(tr, config)(**{**SMALL, **fields}))


def llava() -> nn.Module:
    text = tr.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return tr.LlavaForConditionalGeneration(
        tr.LlavaConfig(
            vision_config=tr.CLIPVisionConfig(**SMALL), text_config=text, image_token_index=39
        )
    )


LLAVA_INPUTS = {**IMAGE, "input_ids": torch.tensor([[1, 39, 39, 39, 39, 5, 6]] * 2)}
SWIN_FIELDS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
               "image_size": 16, "patch_size": 2}  # fmt: skip
SEGFORMER_FIELDS = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2,
                    "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2],
                    "patch_sizes": [3, 3], "strides": [2, 2], "decoder_hidden_size": 8}  # fmt: skip

# name → (model, inputs, new name → old name with {} for numbers; what is not here kept its name)
TABLE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, str]]] = {
    "vit": (vision("ViTForImageClassification", "ViTConfig"), IMAGE, within("vit", VIT)),
    "vit alone": (vision("ViTModel", "ViTConfig"), IMAGE, VIT),
    "deit": (vision("DeiTForImageClassification", "DeiTConfig"), IMAGE, within("deit", VIT)),
    "beit": (vision("BeitForImageClassification", "BeitConfig"), IMAGE, within("beit", VIT)),
    "ijepa": (vision("IJepaForImageClassification", "IJepaConfig"), IMAGE, within("ijepa", VIT)),
    "vit_msn": (vision("ViTMSNForImageClassification", "ViTMSNConfig"), IMAGE, within("vit", VIT)),
    "vit_mae": (
        vision("ViTMAEForPreTraining", "ViTMAEConfig", decoder_hidden_size=16,
               decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
               decoder_intermediate_size=32, mask_ratio=0.0),
        {**IMAGE, "noise": torch.linspace(0, 1, 4).expand(2, 4)},
        within("vit", VIT)
        | {
            ("decoder.decoder_layers.{}." + new): ("decoder.decoder_layers.{}." + old)
            for new, old in BLOCK.items()
        },
    ),
    "vivit": (
        vision("VivitForVideoClassification", "VivitConfig", num_frames=2, tubelet_size=[2, 8, 8]),
        {"pixel_values": torch.ones(1, 2, 3, 16, 16)},
        within("vivit", VIT),
    ),
    "ast": (
        vision("ASTForAudioClassification", "ASTConfig", max_length=32, num_mel_bins=16,
               frequency_stride=8, time_stride=8),
        {"input_values": torch.ones(1, 32, 16)},
        within("audio_spectrogram_transformer", VIT),
    ),
    "dinov2": (vision("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2), IMAGE,
               within("dinov2", DINO)),
    "dinov2 with registers": (
        vision("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
               mlp_ratio=2), IMAGE, within("dinov2_with_registers", DINO)),
    "dinov3": (vision("DINOv3ViTModel", "DINOv3ViTConfig"), IMAGE,
               {f"model.layer.{{}}.{n}": f"layer.{{}}.{n}" for n in (
                   *(f"attention.{p}_proj" for p in "qkvo"), "mlp.up_proj", "mlp.down_proj")}),
    "swin": (lambda: tr.SwinForImageClassification(tr.SwinConfig(**SWIN_FIELDS)), IMAGE,
             within("swin", SWIN)),
    "segformer": (
        vision("SegformerForImageClassification", "SegformerConfig", **SEGFORMER_FIELDS), IMAGE,
        within("segformer", SEGFORMER)),
    "clip's tower": (vision("CLIPVisionModel", "CLIPVisionConfig"), IMAGE, TOWER),
    "siglip's tower": (vision("SiglipVisionModel", "SiglipVisionConfig"), IMAGE, {
        **TOWER, **{n: f"vision_model.{n}" for n in ("head.mlp.fc1", "head.mlp.fc2")}}),
    "clip": (vision("CLIPForImageClassification", "CLIPConfig", vision_config=SMALL), IMAGE, {}),
    "llava": (llava, LLAVA_INPUTS, within("model.vision_tower", TOWER)),
    "bert": (vision("BertForSequenceClassification", "BertConfig", vocab_size=40),
             {"input_ids": torch.tensor([[1, 2, 3]])}, {}),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    make, inputs, _ = TABLE[name]
    torch.manual_seed(7)
    model = make().eval()
    for p in model.parameters():  # some heads start at zero: nothing would reach the output
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.1)
    return model, inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    found: Tensor = next(
        getattr(out, k)
        for k in ("logits", "last_hidden_state", "reconstruction")
        if getattr(out, k, None) is not None
    )
    return found


def old_name(name: str, text: str) -> str:
    """A layer's name by the table; `text` is the model's."""
    for new, old in TABLE[text][2].items():
        found = re.fullmatch(re.escape(new).replace(r"\{\}", r"(\d+)"), name)
        if found is not None:
            return old.format(*found.groups())
    return name


def old_key(key: str, text: str) -> str:
    found = re.fullmatch(r"base_model\.model\.(.+)(\.lora_[AB]\.weight)", key)
    assert found is not None
    return f"base_model.model.{old_name(found.group(1), text)}{found.group(2)}"


def keys(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / TENSORS)


QUICK = ("vit", "beit", "dinov2", "swin", "vit_mae", "clip's tower", "clip", "llava")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TABLE]
)
def test_written_read_and_written_again(name: str, tmp_path: Path) -> None:
    base, inputs = build(name)
    # The pooling head's own attention is MultiheadAttention, whose names are peft's.
    exclude = r".*head\.attention.*"
    model = trained(
        base, lp.LoRA(r=2, alpha=4.0, target_modules="all-linear", exclude_modules=exclude)
    )
    want = run(model, inputs)
    assert not torch.equal(want, run(base, inputs)), "the adapter does nothing"
    lp.save_adapter(model, tmp_path / "new")
    lp.save_adapter(model, tmp_path / "old", names="legacy")
    new, old = keys(tmp_path / "new"), keys(tmp_path / "old")
    assert {old_key(k, name) for k in new} == set(old)
    if TABLE[name][2]:
        assert set(new) != set(old)
    for key, tensor in new.items():
        assert_same_bits(key, old[old_key(key, name)], tensor)
    again = loaded(base, tmp_path / "old")
    assert_same_bits("logits", run(again, inputs), want)
    lp.save_adapter(again, tmp_path / "again", names="legacy")
    assert {k: t.shape for k, t in keys(tmp_path / "again").items()} == {
        k: t.shape for k, t in old.items()
    }
    configs = [
        json.loads((tmp_path / d / CONFIG).read_text())["target_modules"] for d in ("old", "again")
    ]
    assert configs[0] == configs[1]


def as_written_by_4(directory: Path, text: str, **changes: Any) -> None:
    """Turn a directory of today into what peft wrote with transformers 4, by the table alone."""
    save_file({old_key(k, text): t for k, t in keys(directory).items()}, directory / TENSORS)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **changes}))


# what peft's config said → the layers that it means, in today's names
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "suffixes": ("vit", {"target_modules": ["query", "value"]},
                 {"target_modules": ["q_proj", "v_proj"]}),
    "one name for three": ("vit", {"target_modules": ["dense"]},
                           {"target_modules": ["o_proj", "fc1", "fc2"]}),
    "longer suffixes": ("beit", {"target_modules": ["attention.output.dense"]},
                        {"target_modules": ["o_proj"]}),
    "a pattern": ("deit", {"target_modules": r".*encoder\.layer\.0\..*\.(query|key)"},
                  {"target_modules": r".*layers\.0\..*\.(q_proj|k_proj)"}),
    "some layers": ("vit", {"target_modules": ["query"], "layers_to_transform": [1],
                            "layers_pattern": "layer"},
                    {"target_modules": r".*layers\.1\.attention\.q_proj"}),
    "exclude": ("swin", {"target_modules": ["query", "dense"], "exclude_modules": ["output.dense"]},
                {"target_modules": r".*(q_proj|fc1)"}),
    "ranks": ("dinov2", {"target_modules": ["query", "value"], "rank_pattern": {"query": 3},
                         "alpha_pattern": {r"layer\.1\.attention\.attention\.value": 5}},
              {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3},
               "alpha_pattern": {r"layer\.1\.attention\.v_proj": 5}}),
    "llava": ("llava", {"target_modules": r"model\.vision_tower\.vision_model\..*q_proj"},
              {"target_modules": r"model\.vision_tower\..*q_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_configs_of_peft(what: str, tmp_path: Path) -> None:
    """peft writes the adapter, the table renames it: our logits are peft's of today."""
    name, old, new = CONFIGS[what]
    base, inputs = build(name)
    theirs = by_peft(base, tmp_path, peft.LoraConfig, r=2, lora_alpha=8, **new)
    want = run(theirs, inputs)
    as_written_by_4(
        tmp_path, name, **{"rank_pattern": {}, "alpha_pattern": {}, "layers_pattern": None, **old}
    )
    model = loaded(base, tmp_path)
    assert_close("logits", run(model, inputs), want, floor=1e-4)
    lp.save_adapter(model, tmp_path / "again", names="legacy")
    assert keys(tmp_path / "again").keys() == keys(tmp_path).keys()


def test_first_names_of_all(tmp_path: Path) -> None:
    """A LLaVA from before 4.52 calls its parts differently again: read, though never written."""
    base, inputs = build("llava")
    model = trained(base, lp.LoRA(r=2, target_modules=r".*language_model.*(q_proj|down_proj)"))
    lp.save_adapter(model, tmp_path)
    first = {
        k.replace("model.language_model.layers", "language_model.model.layers"): t
        for k, t in keys(tmp_path).items()
    }
    assert first.keys() != keys(tmp_path).keys()
    save_file(first, tmp_path / TENSORS)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["target_modules"] = ["q_proj", "down_proj"]
    config["exclude_modules"] = r"vision_tower.*"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert_same_bits("logits", run(loaded(base, tmp_path), inputs), run(model, inputs))


METHODS: dict[str, Any] = {
    "DoRA": lp.DoRA(r=2, target_modules=["q_proj", "fc1"]),
    "LoRA with biases": lp.LoRA(r=2, bias="lora_only", target_modules=["q_proj"]),
    "LoRA with all biases": lp.LoRA(r=2, bias="all", target_modules=["v_proj"]),
    "IA3": lp.IA3(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "AdaLoRA": lp.AdaLoRA(init_r=3, target_r=2, target_modules=["q_proj", "v_proj"]),
    "LoHa": lp.LoHa(r=2, rank_pattern={"q_proj": 3}, target_modules=["q_proj", "v_proj"]),
    "OFT": lp.OFT(block_size=4, target_modules=["q_proj"]),
    "VeRA": lp.VeRA(r=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("what", METHODS)
def test_every_kind_of_tensor(what: str, tmp_path: Path) -> None:
    base, inputs = build("vit")
    model = trained(base, METHODS[what], modules_to_save=["classifier"])
    lp.save_adapter(model, tmp_path, names="legacy")
    assert all("layers" not in k and "_proj" not in k and ".fc" not in k for k in keys(tmp_path))
    assert not re.search(r"[qkv]_proj|fc[12]", (tmp_path / CONFIG).read_text())
    assert_same_bits("logits", run(loaded(base, tmp_path), inputs), run(model, inputs))


def test_a_layer_that_was_cut_in_two(tmp_path: Path) -> None:
    """DINOv2's SwiGLU: weights_in [2f, d] is gate_proj and up_proj now; B is cut, A kept."""
    torch.manual_seed(7)
    base = vision("Dinov2ForImageClassification", "Dinov2Config", use_swiglu_ffn=True)().eval()
    name = "dinov2.encoder.layer.1.mlp"
    mlp: Any = base.get_submodule(name)
    out, inner = mlp.gate_proj.weight.shape
    A, B = torch.randn(2, inner), torch.randn(2 * out, 2)
    head = f"base_model.model.{name}.weights_in"
    tmp_path.mkdir(exist_ok=True)
    save_file({f"{head}.lora_A.weight": A, f"{head}.lora_B.weight": B}, tmp_path / TENSORS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": f"{name}.weights_in"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = loaded(base, tmp_path)
    with torch.no_grad():
        mlp.gate_proj.weight.add_(3 * B[:out] @ A)
        mlp.up_proj.weight.add_(3 * B[out:] @ A)
    assert_close("logits", run(model, IMAGE), run(base, IMAGE), floor=1e-4)
    with pytest.raises(ValueError, match=r"single layers in transformers 4.*gate_proj"):
        lp.save_adapter(model, tmp_path / "again", names="legacy")
    assert not (tmp_path / "again").exists()


def _drop(data: dict[str, Tensor]) -> None:
    del data[next(k for k in data if "layer.1" in k and "query.lora_A" in k)]


def _add(data: dict[str, Tensor]) -> None:
    key = next(k for k in data if "query" in k)
    data[key.replace("query", "key")] = data[key].clone()


def _mix(data: dict[str, Tensor]) -> None:
    for key in [k for k in data if "layer.1" in k]:
        new = key.replace("encoder.layer", "layers").replace("attention.query", "q_proj")
        data[new] = data.pop(key)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop, "missing"),
        (_add, "k_proj"),
        (_mix, "expected modules of ViTForImageClassification"),
    ],
)
def test_strict_all_the_same(
    edit: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    base, inputs = build("vit")
    model = trained(base, lp.LoRA(r=2, target_modules=["q_proj"]))
    lp.save_adapter(model, tmp_path, names="legacy")
    data = keys(tmp_path)
    edit(data)
    save_file(data, tmp_path / TENSORS)
    before = run(base, inputs)
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(base, tmp_path)
    assert_same_bits("logits", run(base, inputs), before)


def test_only_models_of_transformers_have_old_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lp.attach(model, lp.LoRA(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="expected a model of transformers, got Sequential"):
        lp.save_adapter(model, tmp_path / "out", names="legacy")
    assert not (tmp_path / "out").exists()
