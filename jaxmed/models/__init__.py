"""Models, one family per file: configuration, module, presets and sharding rules."""
