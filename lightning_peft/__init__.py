"""PEFT for PyTorch Lightning."""
