"""Products in e4m3 with scales per row."""
