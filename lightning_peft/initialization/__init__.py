"""Starts that need data (EVA, LoRA-GA): statistics, factors, and their way back on resume."""
