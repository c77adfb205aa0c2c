"""Stages of CoCoLIT: one file per command."""
