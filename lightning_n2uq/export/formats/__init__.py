"""Files of deployed networks: ONNX, QONNX and safetensors."""
