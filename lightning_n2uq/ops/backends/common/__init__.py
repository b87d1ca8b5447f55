"""What the backends share: compilation, threads, random numbers."""
