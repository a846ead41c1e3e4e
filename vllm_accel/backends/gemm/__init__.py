"""Backends of the matrix products."""
