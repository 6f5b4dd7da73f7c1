"""gpt-oss in JAX, read from Hugging Face checkpoints."""
