"""Losses over a large vocabulary, computed a few tokens at a time."""
