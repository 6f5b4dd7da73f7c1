"""The operations on many devices: each has some tokens and some experts, and what they gather is one array of logits.

XLA partitions neither a custom call nor `top_k` by itself: it would gather x, or the logits of every token. So the
operations say how they are partitioned, by `custom_partitioning`. Tokens stay where they are. Where experts are split,
a device multiplies those that it has; logits stay split, and a routing selects behind one all-gather of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jax_router.routing import Routing, RoutingSpec, route_logits

# Of operands x, weight, bias or None, and of `route` also correction_bias, expert_scale, experts, each or None.
Operation = Callable[..., Any]
BY_TOKEN = (0, 5)  # those whose leading axes are tokens: x, and experts to replay; the others have experts


def of_each_token(function: Operation, operands: Sequence[Any]) -> tuple[Any, ...]:
    """The operands, those that have tokens changed by the function."""
    pairs = enumerate(operands)
    return tuple(function(each) if index in BY_TOKEN and each is not None else each for index, each in pairs)


def route_of_shards(
    logits: jax.Array,
    correction_bias: jax.Array | None,
    expert_scale: jax.Array | None,
    experts: jax.Array | None,
    *,
    spec: RoutingSpec,
    dtype: str,
    axis_name: str | tuple[str, ...],
    return_logits: bool,
    invariant: bool,
) -> Routing:
    """`route_logits` where every device has the logits `[..., E / n]` (float32) of its experts, by one all-gather.

    Args:
      logits: of this device's experts; correction_bias and expert_scale likewise, `[E / n]`.
      experts: `[..., k]`, ids among all E, or None to select.
      spec: the rule, of all experts.
      dtype: that of x.
      axis_name: the axes of the mesh that experts are split over, the first the slowest.
      return_logits: whether the result has the logits `[..., E]` of all experts.
      invariant: in a shard_map: the results have the type of what is the same on every device of these axes, if types
        are checked there.
    """
    vectors = [vector for vector in (correction_bias, expert_scale) if vector is not None]
    rows = [logits.reshape(-1, logits.shape[-1]), *(vector.astype(jnp.float32)[None] for vector in vectors)]
    to, names = "varying", {axis_name} if isinstance(axis_name, str) else set(axis_name)
    # With check_vma=False no type says what varies, and JAX transposes the gather as that of what differs.
    if invariant and names <= jax.typeof(jax.lax.axis_index(tuple(names))).manual_axis_type.varying:
        varying = names.union(*(jax.typeof(row).manual_axis_type.varying for row in rows))
        rows, to = [_varying_over(row, varying) for row in rows], "invarying"
    gathered = jax.lax.all_gather(jnp.concatenate(rows), axis_name, axis=1, tiled=True, to=to)
    of_all = iter(gathered[len(gathered) - len(vectors) :])
    everywhere = gathered[: len(gathered) - len(vectors)].reshape(*logits.shape[:-1], gathered.shape[1])
    correction_bias, expert_scale = (v if v is None else next(of_all) for v in (correction_bias, expert_scale))
    weights, selected = route_logits(everywhere, correction_bias, expert_scale, experts, spec=spec, dtype=dtype)
    return Routing(weights, selected, everywhere if return_logits else None)


def _varying_over(array: jax.Array, axes: set[str]) -> jax.Array:
    missing = tuple(axes - jax.typeof(array).manual_axis_type.varying)
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def varying_as(specification: Operation, kernel: Operation) -> Operation:
    """The kernel, its results varying over the axes of a shard_map that the specification's vary over."""

    def typed(*operands: Any) -> Any:
        traced, shapes = jax.make_jaxpr(specification, return_shape=True)(*operands)
        expected = jax.tree.unflatten(jax.tree.structure(shapes), traced.out_avals)
        of_expected = jax.tree.map(lambda aval: aval.manual_axis_type.varying, expected)
        return jax.tree.map(_varying_over, kernel(*operands), of_expected)

    return typed


def by_xla(function: Operation, mesh: Any, shardings: Any) -> Operation:
    """The function, partitioned by XLA on a mesh with Explicit axes too; its results have these shardings there."""
    if not mesh.explicit_axes:
        return function
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=shardings)


def mesh_of(operands: Sequence[jax.Array | None]) -> Any:
    """The mesh that the types of operands name; one that is on none may stand beside others."""
    meshes = [jax.typeof(operand).sharding.mesh for operand in operands if operand is not None]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def shardings_on(mesh: Any, operands: Sequence[jax.Array | None]) -> Any:
    """How operands are sharded on Explicit axes; one that is not on the mesh is on all of it."""

    def of(operand: jax.Array) -> NamedSharding:
        sharding = jax.typeof(operand).sharding
        return sharding if sharding.mesh == mesh else NamedSharding(mesh, PartitionSpec())

    return tuple(None if operand is None else of(operand) for operand in operands)


def repeated(array: jax.Array, times: Any) -> jax.Array:
    """The array `times` times in a new first axis."""
    return jnp.broadcast_to(array, (times, *array.shape))


def sharded_as(array: jax.Array, like: jax.Array) -> jax.Array:
    """The array, sharded on Explicit axes as the other is."""
    sharding = jax.typeof(like).sharding
    return jax.sharding.reshard(array, sharding) if sharding.mesh.explicit_axes else array


def route_by_tokens(
    logits: jax.Array,
    correction_bias: jax.Array | None,
    expert_scale: jax.Array | None,
    experts: jax.Array | None,
    *,
    spec: RoutingSpec,
    dtype: str,
) -> tuple[jax.Array, jax.Array]:
    """`route_logits`, its tokens staying split; experts that are split are gathered."""
    vectors = (v if v is None else jnp.broadcast_to(v, logits.shape) for v in (correction_bias, expert_scale))
    return by_tokens(functools.partial(route_logits, spec=spec, dtype=dtype))(logits, *vectors, experts)


def partitioned(
    whole: Operation,
    of_device: Operation | None,
    of_shards: Operation | None,
    *,
    experts_axis: int,
    return_logits: bool,
) -> Operation:
    """An operation of x, weight, bias and, if it is a routing, more; each device computes its tokens and its experts.

    Args:
      whole: the operation on one device.
      of_device: the operation on what one device has of the operands. None leaves all to XLA.
      of_shards: of a routing: computes, from what one device has of the operands and `axis_name`, the axes that experts
        are split over, the results for all experts. None for the router GEMM, whose logits stay split.
      experts_axis: of the weight.
      return_logits: of a routing: whether its results have logits.
    """

    def shardings(mesh: Any, operands: Sequence[Any]) -> tuple[Any, Any, tuple[str, ...]]:
        """Of the results, of the operands, and the axes that experts are split over."""
        x, weight, *others = operands
        of_tokens, of_experts = _entries(x)[:-1], _names(_entries(weight)[experts_axis])
        of_tokens_alone = {name for entry in of_tokens for name in _names(entry)}.isdisjoint(of_experts)
        if not of_tokens_alone or weight.shape[experts_axis] % math.prod(mesh.shape[name] for name in of_experts):
            of_experts = ()  # every device has all experts

        def placed(*entries: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*entries))

        split, rows = of_experts or None, placed(*of_tokens, None)
        of_weight = placed(split, None) if experts_axis == 0 else placed(None, split)
        of_others = (rows if index in BY_TOKEN else placed(split) for index in range(2, 2 + len(others)))
        pairs = zip(operands, (rows, of_weight, *of_others), strict=True)
        of_routing = Routing(*[rows] * (3 if return_logits else 2))  # type: ignore[arg-type]  # shardings
        results = of_routing if of_shards is not None else placed(*of_tokens, split)
        return results, tuple(None if operand is None else each for operand, each in pairs), of_experts

    def partition(mesh: Any, operands: Sequence[Any], _: Any) -> tuple[Any, ...]:
        results, arguments, of_experts = shardings(mesh, operands)
        assert of_device is not None
        function = of_device
        if of_shards is not None and of_experts:
            function = functools.partial(of_shards, axis_name=of_experts)
        return mesh, _without_mesh(function), results, arguments

    def on_a_mesh(*operands: Any) -> Any:
        each = ["... h", "e h" if experts_axis == 0 else "h e", "e", "e", "e", "... k"]
        of_operands = (each[index] for index, operand in enumerate(operands) if operand is not None)
        of_results = ["... e"] if of_shards is None else ["... k", "... k", *["... f"] * return_logits]
        replicated = ("h", *("" if of_shards is None else "k"), *("f" if return_logits else ""))
        rule = f"{', '.join(of_operands)} -> {', '.join(of_results)}"
        by = None if of_device is None else partition
        return _custom(whole, operands, by, lambda *given: shardings(*given)[0], rule, replicated)

    return on_a_mesh


def by_tokens(function: Operation) -> Operation:
    """A differentiable function of arrays `[..., n]` to such arrays, with the same tokens in the leading axes.

    They stay split. Derivatives of any order and batches are such functions again.
    """

    @jax.custom_batching.custom_vmap
    def split(*operands: Any) -> Any:
        unsharded = jax.tree.map(lambda operand: jax.ShapeDtypeStruct(operand.shape, operand.dtype), operands)
        results = jax.eval_shape(function, *unsharded)

        def rows(mesh: Any, operands: Sequence[Any]) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*_entries(operands[0])[:-1], None))

        def partition(mesh: Any, operands: Sequence[Any], _: Any) -> tuple[Any, ...]:
            each = rows(mesh, operands)
            return mesh, _without_mesh(function), *jax.tree.map(lambda _: each, (results, tuple(operands)))

        columns = [f"c{index}" for index in range(len(jax.tree.leaves((operands, results))))]
        of_each, given = [f"... {column}" for column in columns], len(jax.tree.leaves(operands))
        rule = f"{', '.join(of_each[:given])} -> {', '.join(of_each[given:])}"
        of_results = lambda *given: jax.tree.map(lambda _: rows(*given), results)  # noqa: E731
        return _custom(function, operands, partition, of_results, rule, tuple(columns))

    @split.def_vmap
    def split_batch(size: int, in_batched: Sequence[Any], *operands: Any) -> tuple[Any, Any]:
        pairs = zip(operands, in_batched, strict=True)
        results = split(*(each if each is None or batched else repeated(each, size) for each, batched in pairs))
        return results, jax.tree.map(lambda _: True, results)

    @jax.custom_vjp
    def differentiable(*operands: Any) -> Any:
        return split(*operands)

    def fwd(*operands: Any) -> tuple[Any, Any]:
        return differentiable(*operands), operands

    def bwd(operands: Any, cotangent: Any) -> Any:
        inexact = [each is not None and jnp.issubdtype(each.dtype, jnp.inexact) for each in operands]
        cotangents, structure = jax.tree.flatten(cotangent)

        def pulled_back(*operands: Any) -> Any:
            operands, cotangents = operands[: len(inexact)], operands[len(inexact) :]

            def of_inexact(*given: Any) -> Any:
                remaining = iter(given)
                return function(
                    *(next(remaining) if is_one else each for each, is_one in zip(operands, inexact, strict=True))
                )

            _, pullback = jax.vjp(of_inexact, *(each for each, is_one in zip(operands, inexact, strict=True) if is_one))
            return pullback(jax.tree.unflatten(structure, cotangents))

        remaining = iter(by_tokens(pulled_back)(*operands, *cotangents))
        pairs = zip(operands, inexact, strict=True)
        return tuple(sharded_as(next(remaining), each) if is_one else None for each, is_one in pairs)

    differentiable.defvjp(fwd, bwd)
    return differentiable


def _custom(
    function: Operation,
    operands: tuple[Any, ...],
    partition: Operation | None,
    results: Operation,
    rule: str,
    replicated: Any,
) -> Any:
    """The function of the operands, partitioned by `partition` or XLA; `results` gives the shardings of its results."""
    mesh = mesh_of(operands)
    if mesh.manual_axes:  # in a shard_map the operands are those of one device
        return function(*operands)
    partitioned = function
    if partition is not None and (mesh.empty or mesh.size > 1):  # empty, where jit knows shardings, and no type
        partitioned = custom_partitioning(lambda *operands: function(*operands))
        partitioned.def_partition(
            partition,
            infer_sharding_from_operands=lambda mesh, operands, _: results(mesh, operands),
            sharding_rule=rule,
            need_replication_factors=replicated,
        )
    if not mesh.explicit_axes:
        return partitioned(*operands)
    types = [None if operand is None else jax.typeof(operand) for operand in operands]
    return by_xla(partitioned, mesh, results(mesh, types))(*operands)


def _without_mesh(function: Operation) -> Operation:
    """The function as one device computes it, where no type has a sharding."""

    def of_one_device(*operands: Any) -> Any:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return function(*operands)

    return of_one_device


def _entries(array: Any) -> tuple[Any, ...]:
    """Of every axis of an array, the axes of the mesh that it is split over: None, a name or names."""
    spec = tuple(array.sharding.spec)
    return spec + (None,) * (len(array.shape) - len(spec))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
