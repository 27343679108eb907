"""What matched, what it costs, what is fused: the preflight report and its later lines."""
