"""Synthetic data as pure functions of a key."""
