"""Prompt learning: virtual tokens and prefixes around a model's forward."""
