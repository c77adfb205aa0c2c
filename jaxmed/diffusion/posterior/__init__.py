"""Sampling images that fit a measurement: one file per method, one signature.

`method(key, denoiser, measurement, operator, initial, config) -> (image, Info)`. Denoisers take batches; operators map
one image to one measurement. No sample depends on its batch mates.
"""
