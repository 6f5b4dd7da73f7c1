"""Models that use jax_router, whole and readable."""
