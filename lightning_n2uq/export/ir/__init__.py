"""What a deployed network is: steps in order, their shapes, sizes and stored integers."""
