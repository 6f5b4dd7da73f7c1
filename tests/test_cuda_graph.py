"""XLA captures the custom call in CUDA graphs, and replays compute what they should.

The first part runs in a process of its own, because XLA reads the flag that makes it dump its plans only once:

    python tests/test_cuda_graph.py DUMP_FOLDER [IMPLEMENTATION]
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router as jr
from jax_router.implementations import cuda

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 36  # of gpt-oss-120b
TOKENS, HIDDEN, EXPERTS = 8, 2880, 128
TWO_LAUNCHES = {"tokens": 1024, "hidden": 7168, "experts": 256}  # one call is two launches and a workspace


def router_chain(x, weights, biases, implementation):
    """Logits of every layer. A layer turns the sign of the tokens whose first logit is positive, which is exact: so the
    chain needs each result, and its bits do not depend on how XLA fuses what stands between the calls."""
    all_logits = []
    for weight, bias in zip(weights, biases, strict=True):
        logits = jr.router_gemm(x, weight, bias, implementation=implementation)
        x = jnp.where(logits[:, :1] > 0, -x, x)
        all_logits.append(logits)
    return jnp.stack(all_logits)


def layer_by_layer(x, weights, biases, implementation):
    """The same with one launch at a time, too few in a row for a graph."""
    one = jax.jit(lambda x, weight, bias: jr.router_gemm(x, weight, bias, implementation=implementation))
    all_logits = []
    for weight, bias in zip(weights, biases, strict=True):
        logits = one(x, weight, bias)
        x = jnp.where(logits[:, :1] > 0, -x, x)
        all_logits.append(logits)
    return jnp.stack(all_logits)


def make_inputs(seed, tokens=TOKENS, hidden=HIDDEN, experts=EXPERTS):
    keys = jax.random.split(jax.random.key(seed), 2 * LAYERS + 1)
    x = jax.random.normal(keys[0], (tokens, hidden), jnp.bfloat16)
    weights = [jax.random.normal(key, (experts, hidden), jnp.bfloat16) for key in keys[1 : LAYERS + 1]]
    biases = [jax.random.normal(key, (experts,), jnp.bfloat16) for key in keys[LAYERS + 1 :]]
    return x, weights, biases


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def count_custom_calls(thunks: str) -> tuple[int, int]:
    """Custom calls inside and outside command buffers (CUDA graphs) in XLA's dump of a thunk sequence.

    A line is "<indent><number>: <kind> ..."; what a command buffer holds follows it with a deeper indent.
    """
    inside = outside = 0
    depth = None  # of the command buffer that the present line stands in
    for line in thunks.splitlines():
        thunk = re.match(r"(\s*)\d+:(\s*)(k\w+)", line)
        if thunk is None:
            continue
        indent = len(thunk[1]) + len(thunk[2])
        if depth is not None and indent <= depth:
            depth = None
        if thunk[3] == "kCommandBuffer" and depth is None:
            depth = indent
        elif thunk[3] == "kCustomCall":
            inside, outside = inside + (depth is not None), outside + (depth is None)
    return inside, outside


def test_custom_calls_are_counted_in_and_out_of_command_buffers():
    dump = """000: kCommandBuffer\t
    001: kCustomCall\t
    002: kKernel    \t
    003: kCustomCall\t

004: kCustomCall   \t
005: kCommandBuffer\t
  006: kKernel\t
007: kKernel       \t
008: kCustomCall   \t
"""
    assert count_custom_calls(dump) == (2, 2)
    assert count_custom_calls("") == (0, 0)


@pytest.fixture(scope="module")
def dumped_run(tmp_path_factory):
    """What the process below printed and dumped."""
    folder = tmp_path_factory.mktemp("xla_dump")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache is not dumped
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.gpu
def test_xla_captures_every_router_of_a_jitted_chain_in_a_cuda_graph(dumped_run):
    folder, _ = dumped_run
    listing = "\n".join(path.name for path in sorted(folder.iterdir()) if "router_chain" in path.name)
    parts = ("gpu_after_optimizations.txt", ".thunk_sequence.txt", ".thunk_sequence_after_thunk_passes.txt")
    dumps = [sorted(folder.glob(f"module_*.jit_router_chain*{part}")) for part in parts]
    # The chain is compiled for two numbers of tokens. No third file means that XLA formed no command buffer.
    assert [len(paths) for paths in dumps] == [2, 2, 2], f"unexpected dumps of the chain:\n{listing}"
    for optimized, before, after in zip(*dumps, strict=True):
        calls = optimized.read_text().count(f'custom_call_target="{cuda.TARGET}"')
        planned, converted = count_custom_calls(before.read_text()), count_custom_calls(after.read_text())
        buffers = after.read_text().count("kCommandBuffer")
        print(f"{after.name}: {calls} custom calls, {buffers} command buffers")
        print(f"(inside, outside) them before the thunk passes {planned}, after them {converted}")
        print(after.read_text()[:1500])
        assert calls == LAYERS
        assert planned == (0, LAYERS)
        # Nothing outside means everything inside, also for a release of XLA that does not print what a buffer holds.
        assert converted in ((LAYERS, 0), (0, 0)), after.read_text()[:4000]
        assert buffers >= 1


@pytest.mark.gpu
def test_replays_give_the_bits_of_single_launches(dumped_run):
    _, facts = dumped_run
    print(facts)
    assert facts["first"] == [True] * 3, "a replay on other arrays differs from single launches"
    assert facts["same_address"], "the contents were not changed in place, so the test below shows nothing"
    assert facts["changed_in_place"] == [True] * 3, "a replay did not see that its input changed"


@pytest.mark.gpu
def test_two_interleaved_executables_do_not_disturb_each_other(dumped_run):
    _, facts = dumped_run
    assert facts["interleaved"] == [True] * 20


def run(implementation: str) -> dict[str, object]:
    """Everything that needs a process with XLA's dump switched on. Every comparison is of bits."""
    chain = jax.jit(router_chain, static_argnums=3)
    facts: dict[str, object] = {}
    inputs = [make_inputs(seed) for seed in range(3)]
    expected = [layer_by_layer(*arguments, implementation) for arguments in inputs]
    facts["first"] = [
        all(same_bits(chain(*arguments, implementation), logits) for _ in range(3))
        for arguments, logits in zip(inputs, expected, strict=True)
    ]

    # The same addresses with other contents: a graph that is replayed unchanged must read them again.
    x, weights, biases = inputs[0]
    change = jax.jit(lambda x: x * 0.5 + 1, donate_argnums=0)
    address, addresses, seen = x.unsafe_buffer_pointer(), [], []
    for _ in range(3):
        x = change(x)
        addresses.append(x.unsafe_buffer_pointer())
        seen.append(
            same_bits(chain(x, weights, biases, implementation), layer_by_layer(x, weights, biases, implementation))
        )
    facts["same_address"] = addresses == [address] * 3
    facts["changed_in_place"] = seen

    one, other = inputs[1], make_inputs(7, **TWO_LAUNCHES)
    wanted_one, wanted_other = expected[1], layer_by_layer(*other, implementation)
    pending = []
    for turn in range(20):
        arguments, wanted = ((one, wanted_one), (other, wanted_other))[turn % 2]
        pending.append((chain(*arguments, implementation), wanted))  # not waited for: launches of both are in flight
    facts["interleaved"] = [same_bits(logits, wanted) for logits, wanted in pending]
    return facts


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[2] if len(sys.argv) > 2 else "cuda")))
