"""Iterative stable alignment and clustering."""
