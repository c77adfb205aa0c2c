"""Published medical-imaging systems as readable compositions of pure, jit-compiled JAX functions."""
