"""Hugging Face peft directories, in and out, driven by the table that each method declares."""
