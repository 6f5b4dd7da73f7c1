"""Run twice by tests/test_sharding.py, with the coordinator's address and 0 or 1: a mesh over two processes."""

from __future__ import annotations

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import SPECS, arrays, compiled, operation, same_but_for_rounding


def main(address: str, process: int) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    mesh = jax.make_mesh((2, 4), ("process", "device"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    operands = arrays()
    # Tokens over the processes; then experts over them, so that the gather of logits is between processes.
    for tokens, experts in ((P("process"), P("device")), (P("device"), P("process"))):
        placement = (tokens, *[experts] * 4, tokens)
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, placement, strict=True)]
        for name in ("logits", *SPECS, "replay"):
            results, collectives = compiled(operation(name), *placed)
            with jax.default_device(jax.local_devices()[0]):
                expected = jax.jit(operation(name))(*map(np.asarray, operands))
            assert collectives == ([] if name == "logits" else ["all-gather"]), (name, collectives)
            for result, truth in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
                for shard in result.addressable_shards:
                    part = np.asarray(truth)[shard.index]
                    if part.dtype == np.int32:
                        np.testing.assert_array_equal(shard.data, part, err_msg=name)
                    same_but_for_rounding(shard.data, part, name)
    print("as one device")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
