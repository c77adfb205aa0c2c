"""Stages of the RETFound study: one file per command."""
