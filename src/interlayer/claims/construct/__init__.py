"""Claims of the room construct."""
