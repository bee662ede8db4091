"""From a name the user typed to everything that comes with a model: configuration, weights, tokenizer.

    resolve_model(name) -> ModelSource -> load_model_config, load_generation_config, iter_weights, Tokenizer.from_source

Hugging Face directories and GGUF files look the same from outside: both speak in Hugging Face's names. Only the
light half is re-exported here; `loader.weights`, `loader.dummy` and `loader.tokenizer` are imported by name.
"""

from __future__ import annotations

from nanovllm.loader.generation_config import GenerationDefaults, load_generation_config
from nanovllm.loader.model_config import load_model_config
from nanovllm.loader.resolve import ModelSource, resolve_model

__all__ = ["GenerationDefaults", "ModelSource", "load_generation_config", "load_model_config", "resolve_model"]
