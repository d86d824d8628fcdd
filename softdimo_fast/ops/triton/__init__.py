"""The portable backend: Triton kernels, taken when asked for with ``backend="triton"``.

The modules named after an operator register it with torch and lay out its call; they do not import triton.
``*_kernels`` hold the kernels and are imported by the first call that runs one.
"""
