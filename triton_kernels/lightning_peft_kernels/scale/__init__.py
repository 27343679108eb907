"""Scale per output channel, fused with its gradient."""
