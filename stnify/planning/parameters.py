"""Parameters that are no layer's weight or bias: norms' scales, LayerScale, tokens, tables."""

from collections.abc import Iterator, Sequence

from torch import Tensor, fx, nn

from stnify.composites import DESCRIPTIONS, TENSOR_ATTRIBUTES
from stnify.plan import Refusal, WeightSite
from stnify.planning.computed import parameters_of
from stnify.planning.modules import reason_against
from stnify.trace import Traced


def parameter_sites(
    model: nn.Module, traced: Traced, known: Sequence[WeightSite]
) -> Iterator[WeightSite]:
    """Yield a site for every use of a trainable parameter that ``known`` sites do not cover."""
    free = _free_parameters(model, traced, known)
    for node in traced.graph.nodes:
        if node.op == "call_module":
            owner = str(node.target)
            for path, inside in model.get_submodule(owner).named_parameters():
                name = free.get(id(inside))
                if name is not None:
                    yield _site(name, inside, f"{node.name}:{owner}.{path}", inside=owner)
            continue
        for value in node.all_input_nodes:
            parameter = _read(model, value)
            name = None if parameter is None else free.get(id(parameter))
            if parameter is not None and name is not None and _computes(node):
                yield _site(name, parameter, f"{node.name}:{name}", value=value.name)


def other_uses(model: nn.Module, traced: Traced, sites: Sequence[WeightSite]) -> Iterator[Refusal]:
    """Yield what else the graph computes with weights and biases that respond in ``sites``."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    direct = [site for site in sites if site.computed is None]
    names = {
        id(parameters[name]): name
        for site in direct
        for name, responds in ((site.weight, site.weight_responds), (site.bias, site.bias_responds))
        if name is not None and responds
    }
    served = {node for site in sites for node in (site.node.partition(":")[0], site.value)}
    for node in traced.graph.nodes:
        name = names.get(id(_read(model, node)))
        if name is not None:
            for user in node.users:
                if user.name not in served and _computes(user):
                    yield Refusal(name, f"responds in its layer, but not in {user.name!r}")


def _free_parameters(
    model: nn.Module, traced: Traced, known: Sequence[WeightSite]
) -> dict[int, str]:
    """Return the names of trainable parameters without any part in ``known``, by identity.

    Those of layers that are refused, such as sparse embeddings, stay as they are as well.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    taken = {name for site in known for name in (site.weight, site.bias) if name is not None}
    for value in {site.computed_by for site in known if site.computed_by is not None}:
        taken |= parameters_of(model, traced.graph, value).keys()
    held = {id(parameters[name]) for name in taken}
    return {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.is_floating_point()
        and id(parameter) not in held
        and "parametrizations" not in name.split(".")
        and not reason_against(model.get_submodule(name.rpartition(".")[0]))
    }


def _read(model: nn.Module, node: fx.Node) -> nn.Parameter | None:
    """Return the parameter a node reads."""
    if node.op != "get_attr":
        return None
    path, _, attribute = str(node.target).rpartition(".")
    return model.get_submodule(path)._parameters.get(attribute)


def _computes(node: fx.Node) -> bool:
    """Whether a node computes with the numbers of its inputs."""
    if node.op == "output" or (node.op == "call_method" and node.target in DESCRIPTIONS):
        return False
    return node.target is not getattr or node.args[1] in TENSOR_ATTRIBUTES


def _site(
    name: str,
    parameter: Tensor,
    node: str,
    *,
    inside: str | None = None,
    value: str | None = None,
) -> WeightSite:
    long = [dim for dim, size in enumerate(parameter.shape) if size > 1]
    axis = long[-1] if long else 0
    return WeightSite(
        name=name.rpartition(".")[0],
        kind="Parameter",
        way="function" if inside is None else "swap",
        node=node,
        weight=name,
        bias=None,
        weight_responds=True,
        bias_responds=False,
        axis=axis,
        units=parameter.shape[axis] if parameter.ndim else 1,
        inside=inside,
        value=value,
    )
