"""Building blocks of the models: modules that hold parameters and call kernels."""
