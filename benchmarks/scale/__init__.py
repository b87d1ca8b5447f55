"""What gradient synchronisation costs on any number of ranks: a model, held against measurements."""
