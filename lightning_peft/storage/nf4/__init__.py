"""NF4 and FP4: weights packed to 4 bits."""
