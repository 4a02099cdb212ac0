// linear_codes on VNNI's dot products of bytes: the same source for one instruction set more.
#include "kernels/cpu/linear_codes.cpp"
