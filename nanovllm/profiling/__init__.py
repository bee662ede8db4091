"""Profiles of the engine: run a case under Nsight Systems or PyTorch's profiler, and distil what the GPU did.

    capture ─(trace file, facts)─► trace ─(Trace)─► attribute ─(layer, role)─► distil ─(Profile)─► report, timeline

Everything after `capture` is plain Python over plain data, so a trace can be read on a laptop.
"""
