"""The data side."""
