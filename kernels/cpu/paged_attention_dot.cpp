// paged_attention with dot products of bf16 pairs: the same source for one instruction set more.
#include "kernels/cpu/paged_attention.cpp"
