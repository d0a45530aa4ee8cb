"""The operators that take nearly all of the computing time. Each has a PyTorch implementation and,
where it is built, a compiled one for the CPU or for NVIDIA GPUs."""
