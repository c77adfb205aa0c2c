"""Stages of the system, one file each."""
