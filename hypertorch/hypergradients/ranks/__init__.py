"""One hypergradient that several processes compute together."""
