"""Claims of the room domains.graph."""
