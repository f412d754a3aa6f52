"""Claims of spiking neurons."""
