"""ONNX files, in float32 and float16, and in int8."""
