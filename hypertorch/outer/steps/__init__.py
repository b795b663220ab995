"""What an outer step changes, and what is done with its hypergradient."""
