"""Small analytic stand-ins for every kind of input, and `write`, which makes real files of them."""
