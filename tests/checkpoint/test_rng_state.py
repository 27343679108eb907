"""States of the random generators: written as tensors, read as former versions wrote them too."""

from __future__ import annotations

import io
import random

import torch

from lightning_peft.checkpoint.rng_state import malformed_generators, restore_rng, rng_state


def test_the_state_goes_through_a_file() -> None:
    state = rng_state()
    expected = [random.random() for _ in range(5)]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert malformed_generators(read) == []
    restore_rng(read)
    assert [random.random() for _ in range(5)] == expected


def test_a_tuple_of_numbers_is_read_as_before_format_4() -> None:
    state = {**rng_state(), "python": random.getstate()}
    expected = random.random()
    assert malformed_generators(state) == []
    restore_rng(state)
    assert random.random() == expected


def test_other_numbers_are_malformed() -> None:
    version, words, gauss = rng_state()["python"]
    for bad in (words[:-1], -words, words.float(), words[:, None], words + 2**32):
        state = {**rng_state(), "python": [version, bad, gauss]}
        assert malformed_generators(state) == ["python"]
