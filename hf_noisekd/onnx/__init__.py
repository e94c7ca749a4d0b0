"""Export to ONNX in float32, float16 and int8."""
