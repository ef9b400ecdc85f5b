"""The caller's arguments become checked rows of logits."""
