"""What decoders are made of. A layer fetches its own weights; sharding will live here, not in the model files."""
