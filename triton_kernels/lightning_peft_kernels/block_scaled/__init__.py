"""Weights as codes of 8 or 4 bits with one scale per block: FP8, MXFP4, NVFP4, int8, int4."""
