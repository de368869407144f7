"""NVIDIA FLARE carries the bytes between the owner and the sites, over its provisioned mutual TLS."""
