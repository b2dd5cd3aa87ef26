import os

# Products and sums fuse, as where the kernels were measured: Triton 3.9 warns unless it is told, 3.10 will not fuse.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
