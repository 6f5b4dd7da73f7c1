"""Checks that an implementation computes what it should on this GPU; see jax_router.verify."""
