"""Claims of the room domains.hardware."""
