"""Which tensors a block keeps from forward to backward, and which operators run again.

There is no activation formula: every operator names the tensors its backward pass needs, a tensor needed twice is
kept once, and a recomputation policy says which operators run again instead of keeping what they produced.
The published formulas (Korthikanti 2022, arXiv:2205.05198, equations 1 to 6) follow, and are tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from simllm.errors import InputError, unknown_name
from simllm.models.graph import Graph, Implementation, Layout, Operator, Tensor
from simllm.models.operators import Attention, GroupedProjection, Projection

__all__ = [
    "Recompute",
    "kept_tensors",
    "recomputed_operators",
    "saved_bytes",
    "saved_bytes_by_operator",
    "second_products",
]

#: torchtitan's selective checkpointing keeps the attention and every second matrix product of a layer, and runs the
#: others and all that is pointwise again (arXiv:2410.06511, section 2.1.3). Its products are q, k, v, o, gate, up and
#: down, of which k, o and up run again.
_SECOND_PRODUCTS = ("mixer_norm", "k", "q_norm", "k_norm", "rope", "o", "mlp_norm", "up", "act")


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which operators of a layer run again in the backward pass.

    Attributes
    ----------
    kind : str
        ``none``; ``selective``: the attention core (Korthikanti 2022, section 5); ``full``: the whole layer, of which
        only the input is kept; ``list``: the operators named in ``operators``.
    every : int
        With ``full``: every n-th layer is recomputed, the others keep everything.
    operators : tuple of str
        With ``list``: names of operators of the graph, or of single outputs of a product with several (``k``, ``up``).
    """

    kind: str = "none"
    every: int = 1
    operators: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Recompute:
        """From the command line's spelling.

        >>> Recompute.parse("full")
        Recompute(kind='full', every=1, operators=())
        >>> Recompute.parse("every:4").every
        4
        >>> Recompute.parse("list:act,mlp_norm").operators
        ('act', 'mlp_norm')
        """
        kind, _, rest = text.partition(":")
        if kind in ("none", "selective", "full") and not rest:
            return cls(kind=kind)
        if kind == "every" and rest.isdigit() and int(rest) > 0:
            return cls(kind="full", every=int(rest))
        if kind == "list" and rest:
            return cls(kind="list", operators=tuple(name.strip() for name in rest.split(",")))
        if kind in ("every", "list"):
            raise InputError(f"recompute={text} is incomplete; write every:2 or list:act,mlp_norm")
        raise unknown_name("recompute policy", text, ["none", "selective", "full", "every:N", "list:OPERATOR,..."])

    def __str__(self) -> str:
        if self.kind == "full" and self.every > 1:
            return f"every:{self.every}"
        return f"list:{','.join(self.operators)}" if self.kind == "list" else self.kind

    @property
    def fraction(self) -> float:
        """Fraction of the layers to which the policy applies."""
        return 1 / self.every


NONE = Recompute()


def second_products(graphs: Iterable[Graph]) -> Recompute:
    """What torchtitan's selective checkpointing runs again of a model with these layers."""
    operators = [operator for graph in graphs for operator in graph.operators]
    present = {o.name for o in operators} | {output.name for o in operators for output in o.outputs}
    return Recompute(kind="list", operators=tuple(name for name in _SECOND_PRODUCTS if name in present))


def recomputed_operators(graph: Graph, policy: Recompute, impl: Implementation) -> tuple[Operator, ...]:
    """The operators of a layer that run again.

    A flash kernel recomputes its scores by itself: ``selective`` then changes nothing.
    """
    if not any(graph.runs_backward(operator) for operator in graph.operators):
        return ()
    if policy.kind == "full":
        return graph.operators
    if policy.kind == "selective":
        if impl.attention == "flash":
            return ()
        return tuple(operator for operator in graph.operators if isinstance(operator, Attention))
    if policy.kind == "list":
        parts = {part.name: part for operator in graph.operators for part in _parts(operator)}
        for name in policy.operators:
            if name not in parts:
                raise unknown_name("operator to recompute", name, parts)
        # In the order of the graph, an operator before its own parts.
        return tuple(part for name, part in parts.items() if name in policy.operators)
    return ()


def _parts(operator: Operator) -> Iterator[Operator]:
    """An operator, and of a product with several weights side by side every one as if it stood alone."""
    yield operator
    if isinstance(operator, Projection | GroupedProjection) and len(operator.outputs) > 1:
        for output in operator.outputs:
            weights = tuple(weight for weight in operator.weights if weight.name.startswith(f"{output.name}."))
            yield replace(operator, name=output.name, outputs=(output,), weights=weights)


def kept_tensors(graph: Graph, impl: Implementation, policy: Recompute = NONE) -> dict[str, tuple[Tensor, str]]:
    """The tensors that stay alive until the backward pass: name -> (tensor, operator that asked for it first).

    A tensor that is kept with its gathered tokens has an entry of its own beside the one that is split.

    A recomputed operator keeps nothing itself, but what enters the recomputed region from outside must stay. With
    ``list`` the region's results are dropped too and made again just before they are needed; with ``selective`` and
    ``full`` a result that another operator keeps stays, as `torch.utils.checkpoint` does.
    """
    again = recomputed_operators(graph, policy, impl)
    inside = {operator.name for operator in again}
    produced = {tensor.name for operator in again for tensor in operator.outputs}
    kept = {tensor.name: (tensor, graph.operators[0].name) for tensor in graph.lends}
    for operator in graph.operators:
        if operator.name in inside:
            needed = tuple(tensor for tensor in operator.inputs if tensor.name not in produced)
        else:
            needed = operator.saved(impl) if graph.runs_backward(operator) else ()
        for tensor in needed:
            dropped = policy.kind == "list" and tensor.name in produced
            if dropped:
                continue
            if tensor.gathered:
                kept.setdefault(f"{tensor.name}, gathered", (tensor, operator.name))
            elif tensor.name not in graph.borrows:
                kept.setdefault(tensor.name, (tensor, operator.name))
    return kept


def _on_a_rank(graph: Graph, layout: Layout, impl: Implementation, policy: Recompute) -> Iterator[tuple[float, str]]:
    """Bytes of each kept tensor on a rank, with the operator that asked for it first."""
    kept = kept_tensors(graph, impl, policy)
    for tensor, operator in kept.values():
        # Where the tokens are not split, a gathered tensor is the tensor itself.
        if tensor.gathered and not layout.sequence_parallel and (tensor.name in kept or tensor.name in graph.borrows):
            continue
        yield layout.elements(tensor) * impl.bytes_of(tensor), operator
    if layout.cp > 1:
        again = {operator.name for operator in recomputed_operators(graph, policy, impl)}
        for node in graph.operators:
            if node.name not in again and graph.runs_backward(node):
                yield node.kept_beside(layout, impl), node.name


@lru_cache(maxsize=1 << 16)
def saved_bytes(graph: Graph, layout: Layout, impl: Implementation, policy: Recompute = NONE) -> float:
    """Bytes that one block keeps for one micro-batch on one rank."""
    return sum(size for size, _ in _on_a_rank(graph, layout, impl, policy))


def saved_bytes_by_operator(
    graph: Graph, layout: Layout, impl: Implementation, policy: Recompute = NONE
) -> dict[str, float]:
    """The same by the operator that first needs a tensor; adds up to `saved_bytes`."""
    result: dict[str, float] = {}
    for size, operator in _on_a_rank(graph, layout, impl, policy):
        result[operator] = result.get(operator, 0.0) + size
    return result
