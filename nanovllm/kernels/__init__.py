"""Kernels: jitted Triton code, its launch, and its PyTorch specification (`reference`).

Each module holds one idea: the formula and cast order, the jitted kernel, and a public function that picks the body
(`jit.use_triton`): Triton for CUDA tensors, the reference body otherwise. Nothing here knows modules, configs or
the engine. Importing these modules needs no Triton; it is imported at the first launch.

    norm               rms_norm, add_rms_norm
    activation         silu_mul, rms_silu_mul
    rope               qk_norm_rope_store
    kv_cache           store_kv
    decode_attention   decode_attention
    prefill_attention  prefill_attention
    sample             sample: temperature, noise and argmax
    rms_norm_linear_fusion  rms_norm_linear: RMSNorm and the linear behind it in one pass
"""
