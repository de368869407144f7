"""What both sides need."""
