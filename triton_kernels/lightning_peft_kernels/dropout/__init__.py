"""Dropout from a seed: backward computes the mask again, so none is kept."""
