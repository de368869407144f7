"""Zero-shot, AdapEmu and AdapFu on held-out text."""
