"""Low-rank adapters out of fine-tuned weights, and out of adapters of higher rank."""
