"""The operators that take nearly all of the time, each with a PyTorch body and, where one is
built, a compiled CPU or CUDA body."""
