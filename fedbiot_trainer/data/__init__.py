"""Texts: where they come from, who holds which."""
