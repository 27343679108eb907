"""Checks on the user's own machine."""
