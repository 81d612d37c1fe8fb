"""Blocks run by themselves, one after the other, are the network."""
