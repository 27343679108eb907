"""The report at the start of a run: matched layers, sizes, kernels; and its later lines."""
