"""Where the numbers of a model come from: safetensors files, or seeded random ones of the same shapes."""
