"""Numerical methods that know no model: least squares, line searches, differential equations."""
