"""Fused kernels of lightning_peft; torch and triton only."""
