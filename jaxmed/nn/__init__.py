"""Blocks of networks as Flax modules, and `Model`, a module as two pure functions."""
