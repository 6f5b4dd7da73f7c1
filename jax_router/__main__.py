"""`python -m jax_router` is the command `jax-router`."""

from jax_router.cli import main

if __name__ == "__main__":
    main()
