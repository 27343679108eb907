"""Places where a method's adapters go: weights, blocks, prompts, trained copies."""
