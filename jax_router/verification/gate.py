"""Whether a verification record proves an implementation, and where records are: one rule for tables and dispatcher.

`jax-router verify` writes a record, `verify-<gpu>.json`: `provenance` (gpu, date, source_hash), `library` (one that
JAX_ROUTER_LIBRARY named, or None), `quick`, `interrupted`, and per implementation and shape one of `subjects`: the
fields of `SUBJECT` with `checks`, each `passed`, failed, or None for not run, with a `reason`. `sanitizers` are of the
CUDA kernels. Of each GPU's newest record a copy is kept in the user's cache folder.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KERNELS = ("cuda", "pallas")  # xla needs no verification: it is what runs when nothing is verified
Dtypes = tuple[str, str]  # of x and weight
IN_BFLOAT16: Dtypes = ("bfloat16", "bfloat16")
IN_FLOAT16: Dtypes = ("float16", "float16")
OPERANDS: Mapping[str, tuple[Dtypes, ...]] = {  # what each kernel multiplies
    "cuda": (IN_BFLOAT16, IN_FLOAT16, ("bfloat16", "float32"), ("float32", "float32")),
    "pallas": (IN_BFLOAT16, IN_FLOAT16),
}
REQUIRED = ("accuracy", "experts", "bits", "memory", "load", "graphs", "neighbours")
OF_ROUTE = ("experts",)  # the router GEMM selects none
LOAD, FEWEST_LAUNCHES = "load", 100_000  # under load, for a table: the reverted kernel was wrong once in thousands
# weight_dtype may be left out where it is dtype, that of x.
SUBJECT = ("operation", "implementation", "hidden", "experts", "bias", "dtype", "weight_dtype", "out_dtype", "rule")

Record = dict[str, Any]


def why_unverified(
    record: Record | None, subject: Mapping[str, Any], *, source_hash: str | None, gpu: str | None
) -> str | None:
    """Why `record` does not prove an implementation on a shape, as the end of a sentence, or None if it does.

    A failure counts wherever it was: what is wrong on one shape of an operation is trusted on none.

    Args:
      record: as `read_record` returns it; None for none.
      subject: what is asked about, with the keys in SUBJECT; `rule` may be left out without one, and `weight_dtype`.
      source_hash: of the sources that would run.
      gpu: where they would run, as JAX names it.
    """
    name, operation = subject["implementation"], subject["operation"]
    if name not in KERNELS:
        return None
    if record is None:
        return "there is no verification record of this GPU"
    other = why_of_other(record, source_hash=source_hash, gpu=gpu)
    if other is not None:
        return other
    failed = failure(record, operation, name)
    if failed is not None:
        return failed
    same = [each for each in record["subjects"] if _key(each) == _key(subject)]
    if not same:
        return "the record does not have this shape"
    missing = [_not_run(each) for each in same]
    if all(missing):
        return f"{missing[0]}{', the run was interrupted' if record['interrupted'] else ''}"
    if record["quick"]:
        return "the record is one of --quick, too short for a table"
    return None


def why_of_other(record: Record, *, source_hash: str | None, gpu: str | None) -> str | None:
    """Why a record, passed or failed, says nothing about these sources on this GPU, or None."""
    provenance = record["provenance"]
    if provenance["gpu"] != gpu:
        return f"the record is of another GPU, {provenance['gpu']}"
    if record["library"] is not None:
        return f"the record is of the library {record['library']}, whose sources nobody knows"
    if provenance["source_hash"] != source_hash:
        found = short(provenance["source_hash"])
        return f"the record is of other sources, {found}, these are {short(source_hash)}"
    return None


def failure(record: Record, operation: str, implementation: str) -> str | None:
    """The first check that this implementation failed in this operation, as the end of a sentence, or None."""
    for subject in record["subjects"]:
        if (subject["operation"], subject["implementation"]) == (operation, implementation):
            failed = _failed(subject)
            if failed is not None:
                return f"{failed}, {label(subject)}, {subject.get('date', record['provenance']['date'])[:10]}"
    for tool in record["sanitizers"] if implementation == "cuda" else ():
        if tool["passed"] is False:
            return f"compute-sanitizer's {tool['tool']} failed{_because(tool)}"
    return None


def outcome(subject: Mapping[str, Any]) -> bool | None:
    """Whether a subject passed: False if a check failed or a kernel's required one did not run, None if nothing ran."""
    found = [check["passed"] for check in subject["checks"]]
    if not subject["complete"] or False in found:
        return False
    kernel = subject.get("implementation") in KERNELS
    if kernel and any(check["passed"] is None and check["check"] in REQUIRED for check in subject["checks"]):
        return False
    return True if True in found else None


def complete(record: Record, operation: str, implementation: str) -> list[dict[str, Any]]:
    """The subjects of an implementation in an operation for which every required check was run and passed."""
    wanted = (operation, implementation)
    every = (each for each in record["subjects"] if (each["operation"], each["implementation"]) == wanted)
    return [each for each in every if _not_run(each) is None]


def accepted(record: Record, name: str, subjects: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a table says of the record by which `subjects` were accepted: which record, and launches under load."""
    keys = {_key(subject) for subject in subjects}
    found: dict[str, dict[str, Any]] = {}
    for operation, implementation in sorted(
        {(each["operation"], each["implementation"]) for each in record["subjects"]}
    ):
        proofs = [each for each in complete(record, operation, implementation) if _key(each) in keys]
        if proofs:
            figures = {"shapes": len({_key(each) for each in proofs}), "launches": launches_under_load(proofs)}
            by_dtypes = [
                {"dtype": dtype, "weight_dtype": weight_dtype, "launches": launches_under_load(of_dtypes)}
                for dtype, weight_dtype in OPERANDS[implementation]
                if (of_dtypes := [each for each in proofs if operands_of(each) == (dtype, weight_dtype)])
            ]
            found.setdefault(operation, {})[implementation] = {**figures, "by_dtypes": by_dtypes}
    return {
        "record": Path(name).name,
        **{fact: record["provenance"][fact] for fact in ("gpu", "date", "source_hash")},
        "launches": sum(each["launches"] for of_operation in found.values() for each in of_operation.values()),
        "accepted": found,
    }


def launches_under_load(subjects: Iterable[Mapping[str, Any]]) -> int:
    """How many launches of `complete` subjects were checked while other streams kept the GPU busy."""
    return sum(check["launches"] for each in subjects for check in each["checks"] if check["check"] == LOAD)


def how_to_verify(implementations: Iterable[str], models: Iterable[str] = (), *, quick: bool = False) -> str:
    """The command that verifies these."""
    parts = [f"--implementation {name}" for name in implementations] + [f'--model "{name}"' for name in models]
    return " ".join(["jax-router verify", *(["--quick"] if quick else []), *parts])


def operands_of(subject: Mapping[str, Any]) -> Dtypes:
    """The dtypes of x and of the weight, of a subject of a record or an entry of a table."""
    return subject["dtype"], subject.get("weight_dtype") or subject["dtype"]


def label(subject: Mapping[str, Any]) -> str:
    """For messages: "route of 2880x128 +bias"."""
    return f"{subject['operation']} of {router(subject)}"


def router(subject: Mapping[str, Any]) -> str:
    """For messages: "2880x128 +bias", "3072x256 with a float32 weight"."""
    dtypes = in_words(subject["dtype"], subject.get("weight_dtype"))
    return f"{subject['hidden']}x{subject['experts']}{' +bias' if subject['bias'] else ''}{dtypes}"


def in_words(dtype: str, weight_dtype: str | None) -> str:
    """What is float32, for messages: " in float32", " with a float32 weight", or nothing."""
    if dtype == "float32":
        return " in float32"
    return f" with a {weight_dtype} weight" if weight_dtype not in (None, dtype) else ""


def short(source_hash: str | None) -> str:
    """A source hash for messages."""
    return source_hash[:12] if source_hash else "unknown"


@functools.cache
def present_hash() -> str | None:
    """The hash of the installed sources, computed once; None where they are missing."""
    from jax_router import build, provenance

    try:
        return provenance.source_hash()
    except (build.BuildError, OSError):
        return None


# Records on the disk ---------------------------------------------------------------------------------------------


def file_name(gpu: str | None) -> str:
    """verify-h200.json of "NVIDIA H200"."""
    from jax_router.provenance import gpu_name

    return f"verify-{gpu_name({'gpu': gpu})}.json"


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
      ValueError: no such file, or it does not hold a record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _check_form(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"verification record {path} cannot be used ({reason}). Expected what jax-router verify writes; check the "
            "path, or run jax-router verify again."
        ) from error
    return dict(record)


def find_record(gpu: str, folders: Sequence[Path], *, source_hash: str) -> tuple[Record, str] | None:
    """The record of a GPU in one of `folders`, else the kept one, and where it is. Those of these sources come first.

    Raises:
      ValueError: as `read_record`.
    """
    paths = [path for path in (folder / file_name(gpu) for folder in folders) if path.is_file()]
    found = [(read_record(path), str(path)) for path in paths]
    own = kept(gpu)
    found += [] if own is None else [(own, str(_kept_path(gpu)))]
    return min(
        found, key=lambda each: why_of_other(each[0], source_hash=source_hash, gpu=gpu) is not None, default=None
    )


def keep(record: Record) -> Path | None:
    """Keep a record of a GPU as the newest one in the user's cache folder, whole or not at all.

    What failed before on the same sources stays failed until a run that is not quick passes it: a fault that shows
    once in many launches is not gone because a few more were right.

    Returns:
      Its path; None, with a warning, if there is no place for it, or without one if it is of no GPU or of a library
      that JAX_ROUTER_LIBRARY named.
    """
    gpu = record["provenance"]["gpu"]
    if gpu is None or record["library"] is not None:
        return None
    kept.cache_clear()
    earlier, path = kept(gpu), _kept_path(gpu)
    try:
        if path is None:
            raise OSError("this user has no cache folder")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".verify-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(record if earlier is None else _joined(earlier, record), file, indent=1)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        warnings.warn(
            f"the verification record is not kept for the dispatcher ({error}). Set JAX_ROUTER_CACHE to a folder that "
            "can be written and verify again.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    finally:
        kept.cache_clear()
    return path


@functools.cache
def kept(gpu: str) -> Record | None:
    """The kept record of a GPU; None if there is none or it is broken, which warns once."""
    path = _kept_path(gpu)
    if path is None or not os.path.lexists(path):
        return None
    try:
        return read_record(path)
    except ValueError as error:
        warnings.warn(f"{error} Until then it is ignored; delete {path} to be rid of it.", RuntimeWarning, stacklevel=2)
        return None


def _kept_path(gpu: str) -> Path | None:
    from jax_router import build

    try:
        return build.cache_directory() / file_name(gpu)
    except build.BuildError:
        return None


def _joined(earlier: Record, record: Record) -> Record:
    """`record`, and what failed in `earlier` unless it was of something else, or has passed or failed again since.

    A short run replaces no long one: of it only what failed is added.
    """
    of = record["provenance"]
    if why_of_other(earlier, source_hash=of["source_hash"], gpu=of["gpu"]) is not None:
        return record
    failed = [each for each in record["subjects"] if _failed(each)]
    if record["quick"] and not earlier["quick"]:
        known = {_of(each) for each in earlier["subjects"] if _failed(each)}
        found = {tool["tool"]: tool for tool in record["sanitizers"] if tool["passed"] is False}
        return {
            **earlier,
            "subjects": [*earlier["subjects"], *(each for each in failed if _of(each) not in known)],
            "sanitizers": [found.pop(tool["tool"], tool) for tool in earlier["sanitizers"]] + list(found.values()),
        }
    passed = [] if record["quick"] else [each for each in record["subjects"] if _not_run(each) is None]
    settled = {_of(each) for each in (*passed, *failed)}
    subjects = [
        {"date": earlier["provenance"]["date"], **each}
        for each in earlier["subjects"]
        if _failed(each) and _of(each) not in settled
    ]
    tools = {tool["tool"] for tool in record["sanitizers"] if tool["passed"] is not None}
    sanitizers = [tool for tool in earlier["sanitizers"] if tool["passed"] is False and tool["tool"] not in tools]
    return {
        **record,
        "subjects": [*record["subjects"], *subjects],
        "sanitizers": [*record["sanitizers"], *sanitizers],
    }


def _of(subject: Mapping[str, Any]) -> tuple[str, str | None]:
    return _key(subject), subject.get("source")


def _key(subject: Mapping[str, Any]) -> str:
    return json.dumps([subject.get(name) for name in SUBJECT], sort_keys=True)


def _failed(subject: Mapping[str, Any]) -> str | None:
    """The first check that a subject failed, or None."""
    for check in subject["checks"]:
        if check["passed"] is False:
            return f"{check['check']} failed{_because(check)}"
    # Where a check was not run, or the run was interrupted, the subject did not pass either, and nothing failed.
    ran = subject.get("complete", True) and all(check["passed"] for check in subject["checks"])
    return "it failed" if subject["passed"] is False and ran else None


def _not_run(subject: Mapping[str, Any]) -> str | None:
    """The first required check of a subject that did not pass, as the end of a sentence, or None."""
    checks = {check["check"]: check for check in subject["checks"]}
    for name in REQUIRED:
        if name in OF_ROUTE and subject["operation"] != "route":
            continue
        check = checks.get(name, {"passed": None})
        if check["passed"] is not True:
            return f"{name} {'failed' if check['passed'] is False else 'was not run'}{_because(check)}"
        if name == LOAD and check["launches"] < FEWEST_LAUNCHES:
            return f"{name} had {check['launches']:,} launches, fewer than {FEWEST_LAUNCHES:,}"
    return None


def _because(check: Mapping[str, Any]) -> str:
    return f" ({str(check['reason']).rstrip('.')})" if check.get("reason") else ""


def _check_form(record: Any) -> None:
    """Raise if a part of a record that is read here is not there or is something else."""
    provenance = record["provenance"]
    parts: list[tuple[str, Any, Any]] = [
        ("gpu", provenance["gpu"], str | None),
        ("source_hash", provenance["source_hash"], str),
        ("date", provenance["date"], str),
        ("library", record["library"], str | None),
        ("quick", record["quick"], bool),
        ("interrupted", record["interrupted"], bool),
    ]
    for subject in record["subjects"]:
        parts += [(name, subject[name], str) for name in ("operation", "implementation", "dtype", "out_dtype")]
        parts += [("hidden", subject["hidden"], int), ("experts", subject["experts"], int)]
        parts += [("bias", subject["bias"], bool), ("rule", subject["rule"], dict | None)]
        parts += [("passed", subject["passed"], bool | None), ("weight_dtype", subject.get("weight_dtype"), str | None)]
        for check in subject["checks"]:
            parts += [("check", check["check"], str), ("passed", check["passed"], bool | None)]
            if check["check"] == LOAD and check["passed"]:
                parts.append(("launches", check["launches"], int))
    for tool in record["sanitizers"]:
        parts += [("tool", tool["tool"], str), ("passed", tool["passed"], bool | None)]
    for name, value, kind in parts:
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}")
