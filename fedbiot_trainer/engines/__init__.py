"""Other machines as clients: one folder for each federated engine, which carries the same bytes as one process does."""
