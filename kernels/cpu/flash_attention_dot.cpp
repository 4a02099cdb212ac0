// flash_attention with dot products of bf16 pairs: the same source for one instruction set more.
#include "kernels/cpu/flash_attention.cpp"
