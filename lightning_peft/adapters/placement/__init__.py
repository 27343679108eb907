"""Where a method goes in a model: weights, blocks, sequences."""
