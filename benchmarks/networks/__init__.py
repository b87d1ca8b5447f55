"""Which networks of the ecosystem convert, train, resume and export: `python -m benchmarks.networks`."""
