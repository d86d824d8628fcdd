"""The specification: every operator in plain torch, forward and backward, at any float dtype.

Each backward is written out, because it is also the specification of the kernels' backward; the tests
compare it with torch's own differentiation of the forward. Nothing here looks at values on the host,
so every function also runs on fake tensors, under vmap-free tracing and inside CUDA graphs.
"""
