"""Initialisation from data (EVA, LoRA-GA): statistics, factors, and their restoration on resume."""
