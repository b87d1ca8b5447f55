"""Measurements that the documentation's figures come from; see `python -m benchmarks --help`."""
