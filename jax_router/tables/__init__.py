"""Measured times per GPU, one JSON file per kind of device, written by `jax-router sweep --write-table`.

A file holds, next to its provenance, `entries`: for one (operation, hidden, experts, dtype, weight_dtype, bias,
out_dtype, tokens) every candidate's raw times. Without a weight_dtype the weight has the dtype of x. Only verified
candidates count; `verification` says by which record, and without it no kernel is trusted. An entry without an
operation is one of `router_gemm`. Of `route` the rule is recorded and decides nothing: what an implementation does not
take, it refuses itself. Every entry was measured with a weight [experts, hidden] and serves one [hidden, experts] too.

`configs`, written by `jax-router tune --write-table`, holds the configurations of the CUDA kernels that were measured
at such points, which one the launcher picks and which one won, with the hash of their sources. A winner runs at exactly
that number of tokens and by exactly that rule, or not at all.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

from jax_router.implementations import NAMES
from jax_router.routing import RoutingSpec
from jax_router.verification.gate import Dtypes, operands_of

if TYPE_CHECKING:
    from jax_router.dispatch import Problem

OPERATIONS = ("router_gemm", "route")
Shape = tuple[str, int, int, str, str, bool, str]  # operation, hidden, experts, dtype, weight's, has bias, out_dtype


@dataclass(frozen=True)
class Row:
    """What was measured at one number of tokens."""

    tokens: int
    microseconds: Mapping[str, float]  # by implementation, the winner first, then by time


@dataclass(frozen=True)
class Verification:
    """By which record the kernels of a table were accepted.

    Attributes:
      launches: under load, by operation, implementation and dtypes of x and weight, where the table has a verified
        entry of these.
    """

    gpu: str
    date: str
    source_hash: str
    launches: Mapping[tuple[str, str, Dtypes], int]


@dataclass(frozen=True)
class Winner:
    """A configuration of the CUDA kernels that was faster than the one their launcher picks, by more than noise."""

    config: str  # its name
    pick: str  # that of the launcher's
    gain: float  # how much less time it took, as a fraction

    def __str__(self) -> str:
        return f"{self.config}, measured {self.gain:.1%} faster than the launcher's {self.pick}"


@dataclass(frozen=True)
class Configs:
    """The winning configurations of a table, of kernels built from the sources with this hash."""

    gpu: str  # the kind of device, and not its twin: what they gain depends on the memory
    source_hash: str
    winners: Mapping[tuple[Shape, RoutingSpec | None, int], Winner]  # by shape, rule and tokens


@dataclass(frozen=True)
class Table:
    """The parsed table of one kind of device."""

    name: str  # of its file, for messages
    rows: Mapping[Shape, tuple[Row, ...]]  # by shape, in ascending tokens
    verification: Verification | None = None
    configs: Configs | None = None

    @classmethod
    def parse(cls, document: Mapping[str, Any], name: str = "table") -> Table:
        """Read a table from its JSON.

        Raises:
          KeyError, TypeError, ValueError: it does not have the form of a table.
        """
        rows: dict[Shape, list[Row]] = {}
        for entry in document["entries"]:
            rows.setdefault(_shape(entry), []).append(Row(_tokens(entry), _ranking(entry)))
        by_tokens = {shape: tuple(sorted(unsorted, key=lambda row: row.tokens)) for shape, unsorted in rows.items()}
        return cls(name, by_tokens, _verification(document), _configs(document.get("configs")))

    def nearest(self, problem: Problem) -> Row | None:
        """The row of this operation and shape nearest to the problem's tokens in log2, ties to the fewer, or None."""
        if problem.tokens < 1:
            return None
        rows = self.rows.get(_shape_of(problem), ())
        return min(rows, key=lambda row: (abs(math.log2(row.tokens / problem.tokens)), row.tokens), default=None)

    def winner(self, problem: Problem, kind: str, source_hash: str | None) -> Winner | None:
        """What won at exactly this problem on this kind of device, of kernels with this source hash, or None."""
        if self.configs is None or (self.configs.gpu, self.configs.source_hash) != (kind, source_hash):
            return None
        if problem.weight_layout != "experts_hidden":
            return None
        return self.configs.winners.get((_shape_of(problem), problem.spec, problem.tokens))


# The same processor beside other memory: while one has no table, that of the other is nearer than a heuristic.
TWINS = {"NVIDIA H200": "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3": "NVIDIA H200"}


def file_name(kind: str) -> str:
    """The file that holds the table of a kind of device: "NVIDIA H200" is in `nvidia_h200.json`."""
    return kind.lower().replace(" ", "_") + ".json"


@functools.cache
def load_table(kind: str) -> Table | None:
    """The checked-in table of a kind of device, or of its twin; None if there is none or it is broken (warns once)."""
    folder = importlib.resources.files(__name__)
    for name in map(file_name, filter(None, (kind, TWINS.get(kind)))):
        if (folder / name).is_file():
            return _read(folder / name, name)
    return None


def _read(path: Traversable, name: str) -> Table | None:
    try:
        return Table.parse(json.loads(path.read_text(encoding="utf-8")), name)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as error:
        warnings.warn(
            f"The dispatch table {path} is broken ({type(error).__name__}: {error}). Expected what jax-router sweep "
            "--write-table writes; run that again, or reinstall jax-router. Until then a heuristic chooses.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _verification(document: Mapping[str, Any]) -> Verification | None:
    found = document.get("verification")
    if found is None:
        return None
    verified = {
        (_operation(entry), name, operands_of(entry))
        for entry in document["entries"]
        for name, candidate in entry["candidates"].items()
        if candidate["verified"] is True
    }
    launches = {
        (operation, name, operands_of(each)): int(each["launches"])
        for operation, of_operation in found["accepted"].items()
        for name, accepted in of_operation.items()
        for each in accepted["by_dtypes"]
    }
    known = {key: launches[key] for key in verified if key in launches}
    return Verification(str(found["gpu"]), str(found["date"]), str(found["source_hash"]), known)


def _configs(found: Mapping[str, Any] | None) -> Configs | None:
    if found is None:
        return None
    winners: dict[tuple[Shape, RoutingSpec | None, int], Winner] = {}
    disputed = set()
    for entry in found["entries"]:
        winner, pick = str(entry["winner"]), str(entry["pick"])
        if winner != pick and entry["configs"][winner]["verified"] is not True:
            raise ValueError(f"configuration {winner!r} won without being verified")
        place = (_shape(entry), _spec(entry.get("rule")), _tokens(entry))
        if place in winners and winners[place].config != winner:
            disputed.add(place)
        winners[place] = Winner(winner, pick, float(entry["gain"]))
    # Two rules of one spec differ in the correction bias, of which a problem says nothing.
    better = {place: won for place, won in winners.items() if won.config != won.pick and place not in disputed}
    return Configs(str(found["provenance"]["gpu"]), str(found["source_hash"]), better)


def _spec(rule: Mapping[str, Any] | None) -> RoutingSpec | None:
    if rule is None:
        return None
    return RoutingSpec(**{name: value for name, value in rule.items() if name != "correction_bias"})


def _shape(entry: Mapping[str, Any]) -> Shape:
    sizes = (entry["hidden"], entry["experts"], *operands_of(entry), entry["bias"], entry["out_dtype"])
    return (_operation(entry), *sizes)


def _shape_of(problem: Problem) -> Shape:
    sizes = (problem.hidden, problem.experts, *problem.dtypes, problem.bias_dtype is not None, problem.out_dtype)
    return (problem.operation, *sizes)


def _operation(entry: Mapping[str, Any]) -> str:
    operation = entry.get("operation", OPERATIONS[0])
    if operation not in OPERATIONS:
        raise ValueError(f"operation is {operation!r}, not one of {', '.join(OPERATIONS)}")
    return operation


def _tokens(entry: Mapping[str, Any]) -> int:
    tokens = entry["tokens"]
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens is {tokens!r}, not a positive integer")
    return tokens


def _ranking(entry: Mapping[str, Any]) -> dict[str, float]:
    """Geometric mean of the median warm and cold microseconds of each verified candidate, the winner first."""
    microseconds = {}
    for name, candidate in entry["candidates"].items():
        warm, cold = candidate.get("cupti_warm_us"), candidate.get("cupti_cold_us")
        if name in NAMES and candidate["verified"] is True and warm and cold:
            time = math.sqrt(statistics.median(warm) * statistics.median(cold))
            if not 0 < time < math.inf:
                raise ValueError(f"{name} has a time of {time}, not a positive number")
            microseconds[name] = time
    winner = entry["winner"]
    if winner not in microseconds:
        raise ValueError(f"winner {winner!r} is not among the verified candidates {sorted(microseconds)}")
    return dict(sorted(microseconds.items(), key=lambda item: (item[0] != winner, item[1])))
