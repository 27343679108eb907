"""The tasks of the comparison; data and models come from PyPI packages or from Python itself."""

from benchmarks.compare.tasks.base import Module, Split, Task
from benchmarks.compare.tasks.language import Language
from benchmarks.compare.tasks.series import Series
from benchmarks.compare.tasks.text import Text
from benchmarks.compare.tasks.vision import Vision

__all__ = ["TASKS", "Module", "Split", "Task"]

TASKS: dict[str, type[Task]] = {c.name: c for c in (Text, Vision, Series, Language)}
