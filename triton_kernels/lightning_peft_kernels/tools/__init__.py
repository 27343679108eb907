"""Developer tools: ahead-of-time compilation."""
