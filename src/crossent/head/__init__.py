"""Features become losses; the logits are never all in memory."""
