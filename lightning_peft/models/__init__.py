"""What a model looks like: its usual target layers, its blocks, its outputs, its fingerprint."""
