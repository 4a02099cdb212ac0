// paged_attention on matrix tiles: the same source for one instruction set more.
#define IVR_TILES
#include "kernels/cpu/paged_attention.cpp"
