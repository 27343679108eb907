"""The example runs at a small size: the adapter learns, merging keeps what it computes, and the
example's own assertions (router and packed base bit for bit) hold.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[3] / "examples" / "moe_language_model.py"


def test_smoke(tmp_path: Path, monkeypatch) -> None:
    assert len(PATH.read_text().splitlines()) < 150
    spec = importlib.util.spec_from_file_location("moe_language_model", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "LENGTH", 32)
    monkeypatch.chdir(tmp_path)
    losses = example.main(pretrain=20, adapt=20, experts=4)
    before = losses["code, in 4 bits"]
    assert losses["code, adapted"] < before - 0.05
    assert abs(losses["code, merged"] - losses["code, adapted"]) < 1e-3 * before
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
