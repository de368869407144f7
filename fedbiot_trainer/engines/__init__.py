"""Engines that carry a run's payloads between machines, and what they carry them for."""
