"""From files to batches: splits, the order of records, transforms on the host, augmentation on the device."""
