"""One file per stage: `Config`, presets, and `run`, which reads, calls and writes."""
