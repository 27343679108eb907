"""Hugging Face peft directories, read and written by the exchange table of each method."""
