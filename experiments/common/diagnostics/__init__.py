"""What the commands that look at hypergradients share."""
