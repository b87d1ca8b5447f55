"""What gradient synchronization costs: a model of bytes, seconds and errors, and advice for a run.

Reading order: `volume` (bytes) -> `cluster` (links, ranks, speeds) -> `methods` (seconds) -> `measured`
-> `advice`.
"""
