"""Layers that read the same input and run as one product."""
