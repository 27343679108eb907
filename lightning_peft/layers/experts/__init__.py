"""Fused experts: 3-D weights that the module's own forward reads."""
