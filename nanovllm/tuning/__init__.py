"""`nanovllm tune`: measure the fused operator's candidates on this GPU and write the table that `choose` reads.

    cases        which linears of which models, at which batches (pure)
    candidates   which configurations are worth trying (pure)
    compilers    Triton's disk cache filled from several processes
    measure      one problem: gate against float64, a cheap pass over all, a precise pass over the best
    turns        variants in turn; percentiles (pure)
    search       all problems in turn
    table        the JSON file: merged, provenance, atomic

Imported by `nanovllm.cli.tune` and by the benchmark of the operator, which measures with the same code.
"""
