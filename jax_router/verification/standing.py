"""What the dispatcher knows of each kernel's verification: from the table of a GPU and from the user's own record."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jax_router.tables import OPERATIONS, Table
from jax_router.verification import gate


@dataclass(frozen=True)
class Standing:
    """Of one kernel in one operation on operands of some dtypes on one GPU.

    `str()` of it ends a sentence that starts with the kernel's name.
    """

    what: str
    remedy: str = ""  # the command that verifies it
    distrusted: bool = False  # the automatic choice leaves it out

    def __str__(self) -> str:
        return f"{self.what}; run {self.remedy}" if self.remedy else self.what


Standings = Mapping[tuple[str, str, gate.Dtypes], Standing]  # by operation, implementation and `gate.OPERANDS`


_judged: dict[str, tuple[Table | None, gate.Record | None, str | None, Standings]] = {}


def standings(gpu: str, table: Table | None) -> Standings:
    """`judge` with the user's own record and the installed sources, which are read once and only where needed."""
    from jax_router import build

    own, library = gate.kept(gpu), os.environ.get(build.LIBRARY_VARIABLE) or None
    if gpu in _judged:  # an operation outside of jit asks at every call
        of_table, of_own, of_library, found = _judged[gpu]
        if of_table is table and of_own is own and of_library == library:
            return found
    present = gate.present_hash() if own is not None or table is not None else None
    found = judge(gpu, table, own, source_hash=present, library=library)
    _judged[gpu] = (table, own, library, found)
    return found


def judge(
    gpu: str, table: Table | None, own: gate.Record | None, *, source_hash: str | None, library: str | None = None
) -> dict[tuple[str, str, gate.Dtypes], Standing]:
    """The standing of every kernel. Pure.

    The user's own record comes first, be it that a kernel failed or that it passed, then the table's. Only where
    there is neither is an unverified kernel trusted: the heuristic chooses it as on any GPU that was never measured.
    What passed is trusted with operands of the dtypes that passed, float16 with bfloat16, of which it is the same
    source, where the user's record has none of its own; what failed with some is trusted with none.

    Args:
      gpu: as JAX names it.
      table: of this GPU or its twin.
      own: the kept record of this GPU.
      source_hash: of the installed sources; None if they are missing.
      library: what JAX_ROUTER_LIBRARY names: the user's choice, of which no record says anything.
    """
    if own is not None and gate.why_of_other(own, source_hash=source_hash, gpu=gpu) is not None:
        own = None
    found: dict[tuple[str, str, gate.Dtypes], Standing] = {}
    for operation, name in itertools.product(OPERATIONS, gate.KERNELS):
        for dtypes in gate.OPERANDS[name]:
            known = _of_own(operation, name, dtypes, table, own)
            if known is None and dtypes == gate.IN_FLOAT16:
                known = found[operation, name, gate.IN_BFLOAT16]
                if not known.remedy:
                    known = replace(known, what=f"{known.what}, in bfloat16; float16 is the same source, not run")
            found[operation, name, dtypes] = known or _of_table(operation, name, dtypes, gpu, table, source_hash)
    if library is not None:
        unknown = Standing(f"comes from JAX_ROUTER_LIBRARY={library}, which no verification is of")
        found |= {key: unknown for key in found if key[1] == "cuda"}
    return found


def warning(gpu: str, found: Standings, dtypes: gate.Dtypes) -> str:
    """What to say, once, when the automatic choice leaves something out with operands of these dtypes."""
    left_out = [(name, each.what) for (_, name, of), each in found.items() if each.distrusted and of == dtypes]
    reasons = dict.fromkeys(f"{name} {what}" for name, what in left_out)
    return (
        f"jax_router chooses no kernel on {gpu} that its verification does not vouch for: {'; '.join(reasons)}. Run "
        f"{gate.how_to_verify(dict(left_out))} there; what the argument implementation names is used all the same."
    )


def _of_own(
    operation: str, name: str, dtypes: gate.Dtypes, table: Table | None, own: gate.Record | None
) -> Standing | None:
    """What the user's own record says, if anything."""
    if own is None:
        return None
    failed = gate.failure(own, operation, name)
    if failed is not None:
        return Standing(f"failed its verification on this GPU ({failed})", gate.how_to_verify([name]), distrusted=True)
    proven = [each for each in gate.complete(own, operation, name) if gate.operands_of(each) == dtypes]
    # A short run says something where nothing else does, and does not make up for a table that is not verified.
    if not proven or (own["quick"] and table is not None):
        return None
    quick = " by --quick" if own["quick"] else ""
    provenance = own["provenance"]
    launches = gate.launches_under_load(proven)
    return Standing(
        f"is verified on this GPU{quick}: {_facts(launches, provenance['date'], provenance['source_hash'])}"
    )


def _of_table(
    operation: str, name: str, dtypes: gate.Dtypes, gpu: str, table: Table | None, source_hash: str | None
) -> Standing:
    if table is None:
        quick = dtypes == gate.IN_BFLOAT16  # a quick run has no others, and `cuda` alone unless another is named
        names = [] if quick and name == gate.KERNELS[0] else [name]
        return Standing("is not verified on this GPU", gate.how_to_verify(names, quick=quick))
    record = table.verification
    if record is None:
        why = f"{table.name} names no verification record"
    elif record.source_hash != source_hash:
        others = f"{gate.short(record.source_hash)}, these are {gate.short(source_hash)}"
        why = f"the verification record of {table.name} is of sources {others}"
    elif (operation, name, dtypes) not in record.launches:
        why = f"{table.name} has no verified time of it for {operation}{gate.in_words(*dtypes)}"
    else:
        where = "" if record.gpu == gpu else f" on {record.gpu}, the same processor"
        facts = _facts(record.launches[operation, name, dtypes], record.date, record.source_hash)
        return Standing(f"is verified{where}: {facts}")
    return Standing(f"is not verified ({why})", gate.how_to_verify([name]), distrusted=True)


def _facts(launches: int, date: str, source_hash: str) -> str:
    count = f"{launches / 1e6:.1f} million" if launches >= 100_000 else f"{launches:,}"
    return f"{count} launches under load, 0 wrong, {date[:10]}, sources {gate.short(source_hash)}"
