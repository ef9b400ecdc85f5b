"""Rows of logits become a loss each."""
