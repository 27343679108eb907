"""peft's file formats that are more than a table of names, one module per method.

A module holds `FORMAT`, and the functions that turn a method's tensors and config into peft's. The
method's own file refers to `FORMAT` alone.
"""
