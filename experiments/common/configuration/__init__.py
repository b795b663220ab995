"""From the configuration to typed settings and the objects that they describe."""
