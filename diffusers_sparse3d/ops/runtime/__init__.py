"""Runtime of the operators: dispatch to kernels, launching, recording, registration with PyTorch."""
