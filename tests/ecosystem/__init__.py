"""Packages of others whose modules use Lightning, fine-tuned through their own entry points."""
