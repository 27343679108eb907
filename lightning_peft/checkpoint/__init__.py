"""Checkpoints that hold what was trained: contents, files, the base's identity, random states."""
