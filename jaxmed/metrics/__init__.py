"""Measures of classification, calibration and images, and the statistics that compare them; NumPy on the host."""
