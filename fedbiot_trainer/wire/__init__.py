"""What crosses the line between the two sides."""
