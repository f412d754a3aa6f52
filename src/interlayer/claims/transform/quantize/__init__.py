"""Claims of the room transform.quantize."""
