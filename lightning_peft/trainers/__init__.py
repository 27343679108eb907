"""The packages that bring a Trainer or a Fabric: `lightning` and `pytorch_lightning`."""
