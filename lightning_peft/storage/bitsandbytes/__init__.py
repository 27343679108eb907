"""Layers of bitsandbytes, as found in a model that was loaded quantised.

bitsandbytes itself is imported when a layer is written, or made by `Quantization("int8")`.
"""
