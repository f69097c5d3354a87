"""Networks on their way out: architecture deltas with safetensors, ONNX files and exported programs."""
