"""What `ThresholdAnnealing` changes besides ramps: bit widths, frozen thresholds, batch-norm averages."""
