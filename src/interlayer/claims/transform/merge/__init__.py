"""Claims of the room transform.merge."""
