"""Mutation testing: small errors are put into copies of the library, and the tests that reach them are run."""
