"""Claims of the room transform."""
