"""Mutation tests: small errors are put into the code, and the tests have to notice."""
