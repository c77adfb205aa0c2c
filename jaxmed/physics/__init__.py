"""Forward models with units: what a scanner would measure, as functions of tissue and acquisition."""
