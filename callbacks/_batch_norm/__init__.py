"""What `BatchNormReestimation` needs: training batches a second time."""
