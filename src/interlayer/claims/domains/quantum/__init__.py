"""Claims of the room domains.quantum."""
