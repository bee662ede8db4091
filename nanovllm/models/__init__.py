"""Model families. `registry.build_model` turns a `ModelConfig` into a module; one file a family."""
