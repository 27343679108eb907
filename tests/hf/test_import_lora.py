"""LoRA files of Kohya, diffusers and loralib: W + (alpha / r) · up · down, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers.compare import assert_close, assert_same_bits
from tests.helpers.peft_exchange import build, run

State = dict[str, Tensor]


class Attention(nn.Module):
    """As in diffusers: to_out is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x)
        out: Tensor = self.to_out[0](y)
        return out


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.proj_in = nn.Conv2d(8, 8, 1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(self.conv_in(x)).flatten(2).mT
        out: Tensor = self.down_blocks[0]["attn1"](x)  # type: ignore[index]
        return out


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet()
        config = tr.CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, eos_token_id=2,
        )  # fmt: skip
        self.text_encoder = tr.CLIPTextModel(config)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.unet(x), self.text_encoder(ids).last_hidden_state


def pipeline() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline().eval()


IMAGE, IDS = torch.randn(2, 3, 4, 4), torch.randint(3, 50, (2, 7))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        a, b = model(IMAGE, IDS)
    return torch.cat([a.flatten(), b.flatten()])


UNET = {  # name → rank, alpha
    "conv_in": (2, 1.0),
    "proj_in": (3, 4.0),
    "down_blocks.0.attn1.to_q": (4, 4.0),
    "down_blocks.0.attn1.to_out.0": (4, 2.0),
}
TEXT = {
    "encoder.layers.0.self_attn.q_proj": (4, 4.0),
    "encoder.layers.1.mlp.fc1": (2, 8.0),
}
OLD_TEXT = "text_model."  # what transformers 4 has before the text encoder's layers


def factors(module: Any, r: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    W = module.weight
    kernel = W.shape[2:]
    up = torch.randn(W.shape[0], r, *(1,) * len(kernel), generator=g)
    return torch.randn(r, *W.shape[1:], generator=g), up


def change(module: Any, down: Tensor, up: Tensor, scale: float) -> None:
    """The oracle: fp64, in the weight."""
    with torch.no_grad():
        delta = (up.flatten(1).double() @ down.flatten(1).double()).view(module.weight.shape)
        module.weight.copy_(module.weight.double() + scale * delta)


def kohya(model: Pipeline, alphas: bool = True) -> tuple[State, Pipeline]:
    g = torch.Generator().manual_seed(1)
    state: State = {}
    want = copy.deepcopy(model)
    parts = (("lora_unet_", model.unet, want.unet, UNET, ""),
             ("lora_te_", model.text_encoder, want.text_encoder, TEXT, OLD_TEXT))  # fmt: skip
    for head, part, other, layers, old in parts:
        for name, (r, alpha) in layers.items():
            down, up = factors(part.get_submodule(name), r, g)
            key = head + (old + name).replace(".", "_")
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alphas:
                state[f"{key}.alpha"] = torch.tensor(alpha)
            change(other.get_submodule(name), down, up, alpha / r if alphas else 1.0)
    return state, want


def diffusers(style: str) -> Callable[[Pipeline], tuple[State, Pipeline]]:
    names = {
        "old": (".lora.down.weight", ".lora.up.weight"),
        "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        "peft": (".lora_A.weight", ".lora_B.weight"),
    }

    def make(model: Pipeline) -> tuple[State, Pipeline]:
        g = torch.Generator().manual_seed(1)
        state: State = {}
        want = copy.deepcopy(model)
        for head in ("unet", "text_encoder"):
            old = OLD_TEXT if head == "text_encoder" else ""
            part, other = getattr(model, head), getattr(want, head)
            for name in UNET if head == "unet" else TEXT:
                down, up = factors(part.get_submodule(name), 4 if style == "old" else 2, g)
                a, b = names[style]
                state |= {f"{head}.{old}{name}{a}": down, f"{head}.{old}{name}{b}": up}
                scale = 1.0
                if style == "peft":
                    state[f"{head}.{old}{name}.alpha"], scale = torch.tensor(3.0), 1.5
                change(other.get_submodule(name), down, up, scale)
        return state, want

    return make


GOOD: dict[str, Callable[[Pipeline], tuple[State, Pipeline]]] = {
    "kohya": kohya,
    "kohya without alpha": lambda m: kohya(m, alphas=False),
    "diffusers, lora.down": diffusers("old"),
    "diffusers, lora_linear_layer": diffusers("linear_layer"),
    "diffusers, lora_A and alpha": diffusers("peft"),
}


#: Files that lack their scale → the alpha that is scale 1, if all layers have one rank.
WITHOUT: dict[str, float | None] = {
    "kohya without alpha": None,
    "diffusers, lora.down": 4.0,
    "diffusers, lora_linear_layer": 2.0,
}


@pytest.mark.parametrize("how", ["state", "file", "directory"])
@pytest.mark.parametrize("name", GOOD)
def test_read(name: str, how: str, tmp_path: Path) -> None:
    model = pipeline()
    state, want = GOOD[name](model)
    before = outputs(model)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, file)
    path: Any = {"state": state, "file": file, "directory": tmp_path}[how]
    alpha = WITHOUT.get(name)
    if name in WITHOUT:
        with pytest.raises(ValueError, match=r"no alpha for .* give alpha="):
            lp.load_adapter(model, path)
    if alpha is None and name in WITHOUT:
        return  # ranks differ: no one alpha is scale 1 for all
    report = lp.load_adapter(model, path, alpha=alpha)
    assert_close("outputs", outputs(model), outputs(want), floor=1e-4)
    assert not torch.equal(outputs(model), before)
    assert any("6 of 6 layers" in note for note in report.notes)
    lp.merge(model)
    assert_close("merged", outputs(model), outputs(want), floor=1e-4)


def test_processors_of_old_diffusers() -> None:
    """`unet.save_attn_procs` of 2023: no component, the projection in the processor's name."""
    model, g = pipeline().unet, torch.Generator().manual_seed(1)
    want = copy.deepcopy(model)
    state: State = {}
    for name, key in (("to_q", "to_q_lora"), ("to_out.0", "to_out_lora")):
        path = f"down_blocks.0.attn1.{name}"
        down, up = factors(model.get_submodule(path), 4, g)
        head = f"down_blocks.0.attn1.processor.{key}"
        state |= {f"{head}.down.weight": down, f"{head}.up.weight": up}
        change(want.get_submodule(path), down, up, 1.0)
    lp.load_adapter(model, state, alpha=4.0)
    with torch.no_grad():
        assert_close("output", model(IMAGE), want(IMAGE), floor=1e-4)


def test_one_part_into_its_module() -> None:
    model = pipeline()
    state, want = kohya(model)
    unet = {k: t for k, t in state.items() if k.startswith("lora_unet")}
    lp.load_adapter(model.unet, unet)
    with torch.no_grad():
        assert_close("output", model.unet(IMAGE), want.unet(IMAGE), floor=1e-4)


def test_one_by_one_convolutions_for_linear_layers_and_back() -> None:
    """Programs differ in which of the two a projection is; the factors are the same numbers."""
    model = pipeline()
    state, want = kohya(model)
    for key, t in state.items():
        if "to_q" in key and t.ndim == 2:
            state[key] = t[..., None, None]
        if "proj_in" in key and t.ndim == 4:
            state[key] = t.flatten(1)
    lp.load_adapter(model, state)
    assert_close("outputs", outputs(model), outputs(want), floor=1e-4)


# ---- loralib


def loralib(base: nn.Module, names: dict[str, int]) -> tuple[State, nn.Module]:
    g = torch.Generator().manual_seed(2)
    want = copy.deepcopy(base)
    state: State = {}
    for name, r in names.items():
        module: Any = want.get_submodule(name)
        conv1d = type(module).__name__ == "Conv1D"
        out, inner = module.weight.T.shape if conv1d else module.weight.shape
        if isinstance(module, nn.Embedding):
            out, inner = inner, out
        A, B = torch.randn(r, inner, generator=g), torch.randn(out, r, generator=g)
        state |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        delta = (6.0 / r) * B @ A
        with torch.no_grad():
            module.weight.add_(delta.T if conv1d or isinstance(module, nn.Embedding) else delta)
    return state, want


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bert", {"bert.encoder.layer.0.attention.self.query": 4, "classifier": 2}),
        ("bert", {"bert.embeddings.word_embeddings": 3}),
        ("gpt2", {"transformer.h.0.mlp.c_fc": 4, "transformer.h.1.attn.c_proj": 4}),
        ("vit", {"vit.layers.0.attention.q_proj": 4}),
    ],
    ids=str,
)
def test_loralib(name: str, layers: dict[str, int]) -> None:
    base, inputs = build(name)
    state, want = loralib(base, layers)
    lp.load_adapter(base, state, alpha=6.0)
    assert_close("logits", run(base, inputs), run(want, inputs), floor=1e-4)


def test_loralib_with_old_names() -> None:
    base, inputs = build("vit")
    state, want = loralib(base, {"vit.layers.1.attention.v_proj": 4})
    old = {
        k.replace("layers.1.attention.v_proj", "encoder.layer.1.attention.attention.value"): t
        for k, t in state.items()
    }
    assert old.keys() != state.keys()
    lp.load_adapter(base, old, alpha=6.0)
    assert_close("logits", run(base, inputs), run(want, inputs), floor=1e-4)


@pytest.mark.parametrize("enabled", [(True, True, True), (True, False, True)], ids=str)
def test_merged_linear(enabled: tuple[bool, ...]) -> None:
    """GPT-2's fused q, k, v under factors for some of the three."""
    base, inputs = build("gpt2")
    name, g, r, k = "transformer.h.0.attn.c_attn", torch.Generator().manual_seed(3), 4, sum(enabled)
    A, B = torch.randn(k * r, 32, generator=g), torch.randn(32 * k, r, generator=g)
    want = copy.deepcopy(base)
    W: Any = want.get_submodule(name).weight
    with torch.no_grad():
        for i, place in enumerate(p for p in range(3) if enabled[p]):
            delta = (8.0 / r) * B[32 * i : 32 * (i + 1)] @ A[r * i : r * (i + 1)]
            W[:, 32 * place : 32 * (place + 1)] += delta.T
    state = {f"{name}.lora_A": A, f"{name}.lora_B": B}
    if not all(enabled):
        with pytest.raises(ValueError, match=r"enable_lora= with 2 of 3 parts on.*got None"):
            lp.load_adapter(base, state, alpha=8.0)
    lp.load_adapter(base, state, alpha=8.0, enable_lora=None if all(enabled) else enabled)
    assert_close("logits", run(base, inputs), run(want, inputs), floor=1e-4)


@pytest.mark.parametrize("which", ["adapted", "all", "as the base"])
def test_loralib_biases(which: str) -> None:
    base, inputs = build("bert")
    names = {f"bert.encoder.layer.{i}.attention.self.query": 4 for i in range(2)}
    state, want = loralib(base, names)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in want.named_parameters():
            mine = any(name == f"{n}.bias" for n in names)
            if name.endswith(".bias") and (mine or which != "adapted"):
                if which != "as the base":
                    p.add_(torch.randn(p.shape, generator=g))
                state[name] = p.clone()
    lp.load_adapter(base, state, alpha=6.0)
    assert_close("logits", run(base, inputs), run(want, inputs), floor=1e-4)


# ---- refused


def _of_kohya(edit: Callable[[State], Any]) -> Callable[[Pipeline], State]:
    def make(model: Pipeline) -> State:
        state, _ = kohya(model)
        edit(state)
        return state

    return make


KEY = "lora_unet_down_blocks_0_attn1_to_q"
BAD: dict[str, tuple[Callable[[Pipeline], State], str]] = {
    "an unknown layer": (
        _of_kohya(lambda s: s.update({"lora_unet_nope.lora_up.weight": torch.ones(8, 2),
                                      "lora_unet_nope.lora_down.weight": torch.ones(2, 8)})),
        r"1 of 5 without a certain place, as \['lora_unet.nope'\]",
    ),
    "no up": (_of_kohya(lambda s: s.pop(f"{KEY}.lora_up.weight")), "expected both factors"),
    "LyCORIS": (
        _of_kohya(lambda s: s.update({f"{KEY}.hada_w1_a": torch.ones(2, 2)})),
        "plain LoRA in the same file",
    ),
    "DoRA of Kohya": (
        _of_kohya(lambda s: s.update({f"{KEY}.dora_scale": torch.ones(8, 1)})),
        r"\(DoRA\) for all layers or for none",
    ),
    "a stray tensor": (_of_kohya(lambda s: s.update(other=torch.ones(2))), r"got also \['other'\]"),
    "another shape": (
        _of_kohya(lambda s: s.update({f"{KEY}.lora_down.weight": torch.ones(4, 9)})),
        r"lora_A.weight: expected shape \[4, 8\], got \[4, 9\]",
    ),
    "ranks that differ": (
        _of_kohya(lambda s: s.update({f"{KEY}.lora_down.weight": torch.ones(3, 8)})),
        r"expected factors \[r, in\] and \[out, r\]|parts",
    ),
    "NaN": (_of_kohya(lambda s: s[f"{KEY}.lora_up.weight"].fill_(float("nan"))), "finite values"),
    "a negative alpha": (
        _of_kohya(lambda s: s.update({f"{KEY}.alpha": torch.tensor(-1.0)})), "alpha > 0|positive",
    ),
    "diffusers, ranks without alpha": (
        lambda m: {
            "unet.proj_in.lora.down.weight": torch.ones(2, 8, 1, 1),
            "unet.proj_in.lora.up.weight": torch.ones(8, 2, 1, 1),
            "unet.conv_in.lora.down.weight": torch.ones(3, 3, 3, 3),
            "unet.conv_in.lora.up.weight": torch.ones(8, 3, 1, 1),
        },
        r"got ranks \[2, 3\] and no alpha",
    ),
    "peft without its config": (
        lambda m: {"base_model.model.unet.proj_in.lora_A.weight": torch.ones(2, 8, 1, 1)},
        "expected config= with a state dict of a PeftModel",
    ),
    "loralib without alpha": (
        lambda m: {"unet.conv.lora_A": torch.ones(2, 8), "unet.conv.lora_B": torch.ones(8, 2)},
        "expected alpha=",
    ),
    "nothing of LoRA": (lambda m: {"weight": torch.ones(2, 2)}, r"named as \['weight'\]"),
    "nothing": (lambda m: {}, r"named as \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_refused(what: str) -> None:
    make, message = BAD[what]
    model = pipeline()
    before, keys = outputs(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, make(model))
    assert_same_bits("outputs", outputs(model), before)
    assert list(model.state_dict()) == keys


def test_two_layers_of_one_flat_name() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})})
    model["a_b"] = nn.ModuleDict({"c": nn.Linear(4, 4)})
    state = {"lora_unet_a_b_c.lora_down.weight": torch.ones(2, 4),
             "lora_unet_a_b_c.lora_up.weight": torch.ones(4, 2)}  # fmt: skip
    with pytest.raises(ValueError, match="without a certain place"):
        lp.load_adapter(model, state)


def test_a_part_that_is_missing() -> None:
    model = pipeline()
    state, _ = kohya(model)
    with pytest.raises(ValueError, match=r"module named text_encoder for the part 'lora_te'"):
        lp.load_adapter(nn.ModuleDict({"unet": model.unet}), state)


def test_alpha_of_a_file_that_says_its_own() -> None:
    model = pipeline()
    state, _ = kohya(model)
    with pytest.raises(ValueError, match="got a kohya one, which says its own"):
        lp.load_adapter(model, state, alpha=4.0)


A, B = torch.ones(4, 16), torch.full((16, 4), 0.1)


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "64", "r": "4"}, 16.0),
        ({"lora_alpha": "8"}, 2.0),
        ({"transformer.lora_alpha": "2", "transformer.r": "4"}, 0.5),
        ({"ss_network_alpha": "1.0", "ss_network_dim": "4"}, 0.25),
        ({"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 6}'}, 1.5),
        ({"lora_adapter_metadata": '{"r": 4, "lora_alpha": 6, "use_rslora": true}'}, 3.0),
        ({"lora_adapter_metadata": '{"r": 4, "alpha_pattern": {"to_q": 2}}'}, 0.5),
    ],
)
def test_scales_of_the_header(metadata: dict[str, str], scale: float, tmp_path: Path) -> None:
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"to_q": nn.Linear(16, 16)})})
    layer, x = model["transformer"]["to_q"], torch.randn(3, 16)
    want = layer(x) + scale * x @ A.T @ B.T
    file = tmp_path / "lora.safetensors"
    names = ("transformer.to_q.lora_A.weight", "transformer.to_q.lora_B.weight")
    save_file(dict(zip(names, (A, B), strict=True)), file, metadata=metadata)
    report = lp.load_adapter(model, file)
    assert_close("output", layer(x), want, floor=1e-5)
    assert "1 layers have their scale from the file's header" in report.notes


@pytest.mark.parametrize("inside", ["", "diffusion_model", "transformer"])
def test_names_of_comfyui(inside: str) -> None:
    part = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(16, 16)})])})
    model = nn.ModuleDict({inside: part}) if inside else part
    layer, x = part["blocks"][0]["q"], torch.randn(3, 16)
    want = layer(x) + 0.5 * x @ A.T @ B.T
    head = "diffusion_model.blocks.0.q"
    state = {f"{head}.lora_A.weight": A, f"{head}.lora_B.weight": B}
    lp.load_adapter(model, {**state, f"{head}.alpha": torch.tensor(2.0)})
    assert_close("output", layer(x), want, floor=1e-5)
    with pytest.raises(ValueError, match="without a certain place"):
        lp.load_adapter(nn.ModuleDict({"other": nn.Linear(16, 16)}), state, alpha=2.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no alpha for"),
        ({"ss_network_alpha": "None"}, "no alpha for"),
        ({"lora_alpha": "8", "r": "16"}, r"got ranks \[4\] and no alpha"),
        ({"lora_alpha": "much"}, "positive number, got 'much'"),
        ({"lora_adapter_metadata": "{"}, "expected JSON"),
        ({"lora_adapter_metadata": '{"r": 4, "use_dora": true}'}, "plain LoRA, got use_dora"),
    ],
)
def test_headers_without_a_certain_scale(
    metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"to_q": nn.Linear(16, 16)})
    file = tmp_path / "lora.safetensors"
    save_file({"to_q.lora_A.weight": A, "to_q.lora_B.weight": B}, file, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        lp.load_adapter(model, file)


OTHERS = {
    "adapters library": (["adapter_config.json", "pytorch_adapter.bin"], "the adapters library"),
    "MLX": (["adapter_config.json", "adapters.safetensors"], "MLX"),
    "LitGPT": (["lit_model.pth.lora"], "LitGPT"),
    "torchtune": (["adapter_0.pt", "recipe_state.pt"], "torchtune"),
    "Lightning": (["last.ckpt"], "load_from_checkpoint"),
    "GGUF": (["adapter.gguf"], "GGUF"),
    "a whole model": (["config.json", "model.safetensors"], r"extract_lora\(\)"),
    "shards": (["model-00001-of-00002.safetensors"], "a whole model"),
    "a pickle": (["weights.pt"], "pickle, which can run any code"),
    "two files": (["a.safetensors", "b.safetensors"], "a.safetensors, b.safetensors"),
    "something else": (["notes.txt"], "found notes.txt"),
    "empty": ([], "an empty directory"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_formats_are_named(what: str, tmp_path: Path) -> None:
    files, message = OTHERS[what]
    for name in files:
        (tmp_path / name).write_bytes(b"{}" if name.endswith(".json") else b"no such format")
    base, inputs = build("bert")
    before = run(base, inputs)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lp.load_adapter(base, tmp_path)
    assert_same_bits("logits", run(base, inputs), before)


def test_a_pickle_by_its_own_name(tmp_path: Path) -> None:
    """Never opened: this one would fail the test if it were."""
    file = tmp_path / "lora.pt"

    class Bomb:
        def __reduce__(self) -> Any:
            return pytest.fail, ("the pickle was read",)

    torch.save(Bomb(), file)
    with pytest.raises(ValueError, match="a pickle"):
        lp.load_adapter(build("bert")[0], file)
