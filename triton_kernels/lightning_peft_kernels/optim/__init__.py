"""The 8-bit AdamW step."""
