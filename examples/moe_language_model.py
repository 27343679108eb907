"""A small mixture of experts learns English from Python's language reference, then Python itself.

The model is pretrained here, byte by byte, on the text that `help()` shows. Then its experts, where
most of the weights are, go to 4 bits and a LoRA on them and on attention learns the source of the
decimal module. CPU, under 2 minutes.
"""

import _pydecimal
import argparse
import copy
import inspect
from pydoc_data import topics

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_peft import PEFT, LoRA, Quantization, merge, quantize, unmerge

LENGTH, BATCH = 128, 16
NF4 = Quantization("nf4")


def tokens(text: str) -> Tensor:
    """One byte a token, in rows of one length."""
    ids = torch.frombuffer(bytearray(text, "ascii", "replace"), dtype=torch.uint8).long()
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def split(rows: Tensor, batches: int) -> tuple[DataLoader, Tensor]:
    """So many batches to train on, from everything but every eighth row; 64 rows of those."""
    held_out = torch.arange(len(rows)) % 8 == 7
    train = rows[~held_out][torch.randint(int((~held_out).sum()), (batches * BATCH,))]
    return DataLoader(train, BATCH), rows[held_out][:64]


class LanguageModel(pl.LightningModule):
    """An ordinary module around an ordinary Hugging Face model."""

    def __init__(self, experts: int, lr: float):
        super().__init__()
        config = Qwen3MoeConfig(
            vocab_size=128, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=24, num_experts=experts, num_experts_per_tok=2,
            moe_intermediate_size=64, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.net, self.lr = Qwen3MoeForCausalLM(config), lr

    def training_step(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@torch.no_grad()
def loss(module: LanguageModel, rows: Tensor) -> float:
    module.eval()
    value = module.net(input_ids=rows, labels=rows).loss.item()
    module.train()
    return value


def same_bits(module: nn.Module, reference: nn.Module) -> bool:
    """Whether all that the reference has, packed experts and routers too, is there bit for bit."""
    have = module.state_dict()
    return all(torch.equal(have[key], value) for key, value in reference.state_dict().items())


def fit(module: LanguageModel, data: DataLoader, *callbacks: pl.Callback) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    module.train()
    pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[*callbacks], **quiet).fit(module, data)


def main(pretrain: int = 250, adapt: int = 120, experts: int = 16) -> dict[str, float]:
    pl.seed_everything(0)
    english, prose = split(tokens("\n".join(topics.topics.values())), pretrain)
    python, code = split(tokens(inspect.getsource(_pydecimal)), adapt)
    module = LanguageModel(experts, lr=3e-3)
    fit(module, english)
    losses = {"prose, pretrained": loss(module, prose), "code, pretrained": loss(module, code)}

    quantize(reference := copy.deepcopy(module), NF4)
    losses["code, in 4 bits"] = loss(reference, code)
    lora = LoRA(r=8, alpha=16, target_modules="all-linear")  # attention and experts, no router
    fit(module, python, PEFT(lora, quantization=NF4))
    losses["code, adapted"] = loss(module, code)
    assert same_bits(module, reference), "the base or a router changed"

    merge(module)
    losses["code, merged"] = loss(module, code)
    unmerge(module)
    assert same_bits(module, reference), "unmerging did not give the base back"
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("pretrain", 250), ("adapt", 120), ("experts", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, value in main(**vars(parser.parse_args())).items():
        print(f"{name:<20}{value:8.3f}")
    print("routers and packed base: bit for bit as before")
