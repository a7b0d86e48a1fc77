"""`make mutants`: the code is broken in many small ways, one at a time, and the tests must notice each."""
