"""Published weights: per family the names of its tensors, its preprocessing, import and export."""
