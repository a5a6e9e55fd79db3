"""One UNet, several engines: eager, CUDA graph, torch.compile, ONNX Runtime, TensorRT."""
