"""How the input of a sublayer is formed from earlier outputs."""
