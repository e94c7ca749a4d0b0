"""Classifiers: loading, saving, input sizes, costs, and their BatchNorm layers."""
