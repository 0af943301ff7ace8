"""Which precision a machine computes quickly in."""


def fast_precision(device: str) -> str:
    """`bfloat16` where the device has fast kernels for it, else `float32`: what the presets of pretrained models take.

    `device` is the trainer's: cpu, cuda or auto. On CPUs it is the question that PyTorch itself asks before it leaves a
    product in bfloat16 to oneDNN: without that, its own loops are some 60 times slower than float32 (measured on an AMD
    EPYC of the third generation, which has AVX2 but no AVX-512).
    """
    import torch  # seconds, and only these presets ask

    if device != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32"
