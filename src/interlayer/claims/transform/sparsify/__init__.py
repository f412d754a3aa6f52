"""Claims of the room transform.sparsify."""
