"""The mathematics step by step, and pages to play with it."""
