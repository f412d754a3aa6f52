"""Methods for the hardware that networks run on."""
