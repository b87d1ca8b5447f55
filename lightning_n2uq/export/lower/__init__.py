"""From a trained network to the steps of a deployed one."""
