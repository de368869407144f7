"""A whole run: rounds, clients, state."""
