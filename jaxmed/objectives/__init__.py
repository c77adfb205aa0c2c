"""Scalar losses with their metrics."""
