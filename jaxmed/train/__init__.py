"""Running things: run folders, logs and progress."""
