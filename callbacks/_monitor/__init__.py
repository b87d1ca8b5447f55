"""How `QuantizationMonitor` measures layers, writes its file and draws."""
