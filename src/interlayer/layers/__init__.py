"""Systems that fill a slot of a backbone."""
