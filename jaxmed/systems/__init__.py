"""Ten published medical-imaging systems, each a folder of stages over the shared parts."""
