"""Noise: distributions, their names, and data sets of them."""
