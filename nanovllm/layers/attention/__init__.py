"""Attention over the paged KV cache: one interface (`backend`), several bodies, one of which (`sdpa`) runs anywhere."""
