"""What the literature and our own measurements say about methods, as data."""
