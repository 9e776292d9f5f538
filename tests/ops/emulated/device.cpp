// The CUDA source, compiled for the CPU.
#include "projection.cu"
