"""Which parameters are sparse."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from glob import escape

from torch import Tensor
from torch.nn import Parameter

from topkast_func.config.topkast_config import TopKastConfig
from topkast_func.sparsity import ByPattern
from topkast_func.trees import check_params
from topkast_func.types import Params
from topkast_func.warn import warn_caller

_WEIGHT = re.compile(r"(?:^|[._])weight[._]")
"""In the names of weights that end otherwise: ``weight_ih_l0``, ``parametrizations.weight.…``."""


def select(params: Params, config: TopKastConfig) -> list[str]:
    """Name the parameters that are to be sparse, in the order of ``params``.

    Args:
        params: The parameter tree.
        config: The configuration: ``sparse`` and ``keep_dense``.

    Returns:
        Names of the selected parameters, at least one.

    Raises:
        ValueError: A pattern, the predicate or the default rule selects no parameter, or one
            of complex numbers.
    """
    sparse = config.sparse
    told = f"sparse={sparse!r}"
    if sparse is None:
        told += " (every parameter of two or more dimensions named …weight)"
        chosen = [name for name, leaf in params.items() if _by_default(name, leaf, config)]
    elif callable(sparse):
        chosen = [name for name, leaf in params.items() if sparse(name, leaf)]
    else:
        chosen = _matching("sparse", sparse, params)
    dense = _matching("keep_dense", config.keep_dense, params)
    chosen = [name for name in chosen if name not in dense]
    if not chosen:
        told += f" less keep_dense={config.keep_dense!r}" if dense else ""
        others = _by_other_names(params, config)
        way = f"; choose by patterns, such as sparse={_glob(others[0])!r}" if others else ""
        if fields := {undivided(params[name].shape, config) for name in weights_among(params)}:
            way += "".join(f"; {field} divides none of its shapes" for field in fields - {None})
        if unreal := [name for name, leaf in params.items() if leaf.is_complex()]:
            way += f"; {_listed(unreal)} of complex numbers, which are trained densely"
        raise ValueError(f"{told} selects no parameter{way}; there are: {_listed(params)}")
    if unreal := [name for name in chosen if params[name].is_complex()]:
        raise ValueError(
            f"sparse={sparse!r} selects {unreal}, of complex numbers, which are trained densely: "
            "leave them out of it, or name them in keep_dense"
        )
    return chosen


def warn_of_other_names(params: Params, config: TopKastConfig) -> None:
    """Warn of weights, as of `torch.nn.GRU`, that are dense by default for their names alone.

    Args:
        params: The parameter tree.
        config: The configuration, which silences this by ``sparse``, ``keep_dense`` or a
            ``forward_sparsity`` by pattern.
    """
    by_pattern = isinstance(config.forward_sparsity, ByPattern)
    if config.sparse is None and not by_pattern and config.method.sparsifies:
        named = [name for name in _by_other_names(params, config) if _WEIGHT.search(name)]
        if named:
            warn_caller(
                f"dense by default, since their names do not end in 'weight': {_listed(named)}; "
                f"sparse={_glob(named[0])!r} and further patterns make them sparse, keep_dense= "
                "says that they are to be dense"
            )


def _by_other_names(params: Params, config: TopKastConfig) -> list[str]:
    """Name what could be sparse, but is not by default, for its name alone."""
    return [
        name
        for name, leaf in params.items()
        if not name.endswith("weight")
        and _by_default("weight", leaf, config)
        and not matches(name, config.keep_dense)
    ]


def _glob(name: str) -> str:
    """Return a pattern that matches a parameter and those that are named as it is."""
    before, found, _ = name.partition("weight")
    return f"{escape(before)}weight*" if found else escape(name)


def first_weight(params: Params) -> str:
    """Return the name of the first parameter of two or more dimensions named ``…weight``.

    For ``keep_dense``: where the name has characters that a glob pattern reads otherwise, they
    are escaped. Names come in the order in which a module defines them; frozen parameters of a
    module are passed over.

    Args:
        params: Weights by name.

    Returns:
        The name, as a pattern that matches it alone.

    Raises:
        TypeError: ``params`` is no mapping.
        ValueError: There is none.
    """
    return _weights(params)[0]


def last_weight(params: Params) -> str:
    """Return the name of the last such parameter; see `first_weight`."""
    return _weights(params)[-1]


def _weights(params: Params) -> list[str]:
    check_params(params)
    trained = {n: p for n, p in params.items() if not isinstance(p, Parameter) or p.requires_grad}
    names = [escape(name) for name in weights_among(trained)]
    if not names:
        raise ValueError(f"no parameter is a weight; there are: {_listed(params)}")
    return names


def weights_among(params: Params) -> list[str]:
    """Return the names of the parameters of two or more dimensions named ``…weight``."""
    return [name for name, leaf in params.items() if _is_weight(name, leaf)]


def reason_dense(name: str, leaf: Tensor, config: TopKastConfig | None) -> str:
    """Say why a parameter was not selected; see `select`.

    Args:
        name: Its name.
        leaf: The parameter.
        config: The configuration; None if it is not known.

    Returns:
        A few words.
    """
    if config and not config.method.sparsifies:
        return "the method is dense"
    if leaf.is_complex():
        return "complex numbers"
    if config and matches(name, config.keep_dense):
        return "keep_dense"
    if config and config.sparse is not None:
        return "not in sparse="
    if leaf.ndim < 2:
        return "one dimension" if leaf.ndim else "a number"
    if not _is_weight(name, leaf):
        return 'its name does not end in "weight"'
    if config and (field := undivided(leaf.shape, config)):
        return f"{field} does not divide it"
    return "left out by the configuration"


def _is_weight(name: str, leaf: Tensor) -> bool:
    return name.endswith("weight") and leaf.ndim >= 2 and not leaf.is_complex()


def _by_default(name: str, leaf: Tensor, config: TopKastConfig) -> bool:
    return _is_weight(name, leaf) and undivided(leaf.shape, config) is None


def undivided(shape: Sequence[int], config: TopKastConfig) -> str | None:
    """Name what does not divide a parameter into whole blocks or groups.

    Args:
        shape: Shape of the parameter.
        config: The configuration.

    Returns:
        ``block_shape`` or ``pattern`` with its value; None where both divide the first two axes.
    """
    if _remainder(shape, config.block_shape):
        return f"block_shape={config.block_shape}"
    return f"pattern={config.pattern!r}" if _remainder(shape, (1, config.group or 1)) else None


def _remainder(shape: Sequence[int], sides: tuple[int, int]) -> bool:
    if sides == (1, 1):
        return False
    return len(shape) < 2 or any(n % side for n, side in zip(shape, sides, strict=False))


def _matching(field: str, globs: Iterable[str], params: Params) -> list[str]:
    by_glob = {glob: [name for name in params if matches(name, (glob,))] for glob in globs}
    matched = {name for glob in globs for name in matched_by(field, glob, by_glob[glob], params)}
    return [name for name in params if name in matched]


def matches(name: str, globs: Iterable[str]) -> bool:
    """Return whether one of several patterns matches a name, or is it."""
    return any(name == glob or fnmatchcase(name, glob) for glob in globs)


def matched_by(field: str, glob: str, matched: list[str], names: Iterable[str]) -> list[str]:
    """Return the names that a pattern matched, if there are any.

    Args:
        field: Where the pattern stands, for the error.
        glob: The pattern.
        matched: Names that it matches.
        names: Names that it could have matched, for the error.

    Returns:
        ``matched``.

    Raises:
        ValueError: It is empty.
    """
    if not matched:
        kind = "parameter" if field in ("sparse", "keep_dense") else "selected parameter"
        raise ValueError(f"{field}: {glob!r} matches no {kind}; there are: {_listed(names)}")
    return matched


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
