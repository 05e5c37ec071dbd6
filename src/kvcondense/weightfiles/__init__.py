"""Weight files as they are published: names of tensors, storage of matrices, safetensors and GGUF."""
