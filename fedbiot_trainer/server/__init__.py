"""The owner side."""
