"""The Triton kernels, one file an op; imported by `eesd_kernels._library.triton_op` on first use.

Each module has a function of its op's name that takes the op's arguments and `out`, a tuple of
tensors to write to (None: it allocates them), enqueues on the current stream and returns the
results; None for arguments that it leaves to the reference. Shapes and dtypes are checked above,
in the public function. Nothing here synchronises, reads the device, or keys a choice on the number
of rows, so a row has the same bits in any batch.
"""
