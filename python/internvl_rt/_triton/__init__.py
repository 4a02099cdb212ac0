"""Triton kernels, one module per op; installed as internvl_rt._triton and imported on first use.

Each module has a launcher of the op's name that takes the native face's arguments.
"""
