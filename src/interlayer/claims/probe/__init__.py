"""Claims of the room probe."""
