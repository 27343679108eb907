"""Tables that map 4-bit and 8-bit codes to values."""
