"""Facts about a model: its usual target layers, its blocks, its outputs, its fingerprint."""
