"""Which tensors a step keeps for backward: recomputed blocks, and tensors in host memory."""
