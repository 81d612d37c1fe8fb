"""How weights are rounded: beyond nearest, by what the rounding does to the network."""
