"""LightningCLI: the callback and a nested method from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft import PEFT, DoRA
from lightning_peft.layers.adapted import adapted_modules, adapters_of
from tests.helpers.lightning_package import in_package, pl
from tests.helpers.nets import Plain

pytestmark = pytest.mark.usefixtures("lightning_package")

CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  max_epochs: 1
  callbacks:
    - class_path: lightning_peft.PEFT
      init_args:
        report: false
        method:
          class_path: lightning_peft.DoRA
          init_args:
            r: 2
            target_modules: all-linear
            rank_pattern: {"0": 3}
        quantization:
          kind: nf4
          block_size: 32
model:
  lr: 0.02
"""


def test_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    cli = pl.cli.LightningCLI(
        in_package(Plain), args=["fit", "--config", str(path)], save_config_callback=None
    )
    assert any(isinstance(c, PEFT) for c in cli.trainer.callbacks)
    adapters = [a for _, m in adapted_modules(cli.model) for a in adapters_of(m)]
    want = DoRA(r=2, target_modules="all-linear", rank_pattern={"0": 3})
    assert [a.method for a in adapters] == [want] * 3
    assert cli.trainer.global_step == 4


def test_bad_values_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("r: 2", "r: 0"))
    with pytest.raises((SystemExit, ValueError)) as caught:
        pl.cli.LightningCLI(
            in_package(Plain), args=["fit", "--config", str(path)], save_config_callback=None
        )
    assert "rank >= 1" in capsys.readouterr().err + str(caught.value)
