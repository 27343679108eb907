"""Run by tests/test_packaging.py where triton, bitsandbytes and transformers are not installed."""

import importlib.util
import json
import sys
import tempfile

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp

ABSENT = "triton", "bitsandbytes", "transformers"


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Vision(Net):
    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(1, 8, 3, padding=1)
        self.net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), conv, nn.Flatten(), nn.Linear(512, 8))


def fit(module: Net, callback: lp.PEFT) -> Net:
    data = DataLoader(list(zip(torch.randn(16, 64), torch.randint(8, (16,)), strict=True)), 8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], enable_checkpointing=False, **quiet
    )
    trainer.fit(module, data)
    return module


def message(call) -> str:
    try:
        call()
    except (ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    assert [p for p in ABSENT if importlib.util.find_spec(p)] == []
    torch.manual_seed(0)
    lora = lp.LoRA(r=4, target_modules="all-linear")
    module = fit(Net(), lp.PEFT(lora, quantization="nf4", optimizer="adamw_8bit"))
    x = torch.randn(4, 64)
    attached = module.net(x)

    fresh = Net()
    with tempfile.TemporaryDirectory() as folder:
        plain = fit(fresh, lp.PEFT(lora, report=False))
        expected = plain.net(x)
        lp.save_adapter(plain, folder)
        lp.detach(plain)
        lp.load_adapter(plain, folder)
        exchanged = torch.equal(plain.net(x), expected)
        with open(f"{folder}/config.json", "w") as file:
            json.dump({"model_type": "llama"}, file)
        planned = message(lambda: lp.estimate_memory(folder, lora))
    vision = fit(Vision(), lp.PEFT(lp.LoRA(r=2, target_modules=["1"])))
    moved = vision.net[1].peft["default"].tensors()["B"].abs().max().item()
    lp.merge(module)
    module.example_input_array = torch.randn(2, 64)
    answers = {
        "merge": (module.net(x) - attached).abs().max().item(),
        "exchanged": exchanged,
        "int8": message(lambda: lp.quantize(Net(), lp.Quantization("int8"))),
        "plan": planned,
        "vision": moved,
    }
    print(json.dumps(answers), file=sys.stderr)


if __name__ == "__main__":
    main()
