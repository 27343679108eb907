"""Quantise and dequantise 4-bit weights; products with packed weights."""
