"""What a user's module needs to serve here: a function of its parameters, norms that differentiate rightly."""
