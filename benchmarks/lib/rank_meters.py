"""What one rank reads, sends, and takes of memory."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["Collectives", "CountedRows", "Peak", "count_reads"]

#: Operations of torch.distributed, and the position of what they send.
_SENDERS = {
    **{"allgather_into_tensor_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1},
    **{"allgather_": 1, "all_gather_into_tensor": 0},
}


class Collectives(TorchDispatchMode):
    """Counts calls, and bytes of their inputs, of gathers and reductions.

    Attributes:
        calls: Calls by name of the operation.
        sent: Bytes by name of the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # what it sends comes here next
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name in _SENDERS:
            self.calls[name] += 1
            self.sent[name] += sum(t.nbytes for t in tree_iter(args[_SENDERS[name]]))
        return func(*args, **(kwargs or {}))


def _anonymous() -> int:
    """Bytes of this process's own memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("expected RssAnon in /proc/self/status, found none; this needs Linux")


class Peak(threading.Thread):
    """Growth of anonymous memory until `over` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes, self.over, self.growth = _anonymous(), False, 0

    def run(self) -> None:
        while not self.over:
            self.growth = max(self.growth, _anonymous() - self.start_bytes)
            time.sleep(0.002)


class CountedRows:
    """Rows of a tensor in a file, whose bytes are counted as they are read."""

    read = 0

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, where: Any) -> torch.Tensor:
        part: torch.Tensor = self._rows[where]
        CountedRows.read += part.nbytes
        return part


def count_reads() -> None:
    """Count the bytes that this process reads from a base's files."""
    from lightning_peft.storage.tensor_files import TensorFiles

    plain = TensorFiles.open

    @contextmanager
    def counted(files: TensorFiles, key: str) -> Iterator[Any]:
        with plain(files, key) as rows:
            yield CountedRows(rows)

    mock.patch.object(TensorFiles, "open", counted).start()
