"""Products grouped by expert: dense and packed weights, and their low-rank adapters."""
