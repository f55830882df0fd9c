"""Which modules of a base a PEFT config targets: for formats whose values depend on all of them.

The tensors say which modules are adapted. But VeRA sizes, and TinyLoRA numbers, what it draws at
random by every module that the config matches, so where such values are not in the file, tensors
and config must agree.
Source: PEFT 0.21, ``tuners/tuners_utils.py``: ``check_target_module_exists``.
"""

import re
from collections.abc import Iterable

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.base import RawAdapter, ReadContext
from shoal.adapters.formats.config_fields import Config, field
from shoal.adapters.formats.keys import module_path
from shoal.adapters.formats.patterns import parse_pattern

# What else PEFT can adapt in a decoder: these would have tensors, and those would be refused.
_OTHERS = ("model.embed_tokens", "lm_head")
_NAMES_MAX = 4096
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_complete(raw: RawAdapter, context: ReadContext, why: str) -> None:
    """Refuse a file whose tensors are not of exactly the modules that its config targets.

    Args:
        why: what depends on it, for the message.
    """
    targets = {module_path(target): target for target in context.shape.targets()}
    matched = set(_matching(raw.config, [*targets, *_OTHERS]))
    given = {module_path(target) for target in raw.targets}
    if matched != given:
        differing = min(matched ^ given)
        which = "has no tensors" if differing in matched else "has tensors"
        is_or_not = "is" if differing in matched else "is not"
        raise AdapterRejected(
            field("target_modules"),
            f"{differing} {is_or_not} targeted but {which}: {why} needs all of them",
        )


def _matching(config: Config, paths: list[str]) -> Iterable[str]:
    targeted = config.get("target_modules")
    found = _matched(targeted, "target_modules", paths)
    excluded = config.get("exclude_modules")
    if excluded:
        out = set(_matched(excluded, "exclude_modules", paths))
        found = [path for path in found if path not in out]
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targeted, str):
        return found
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise AdapterRejected(field("layers_pattern"), "must be null or layers")
    wanted = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in wanted):
        raise AdapterRejected(field("layers_to_transform"), "must be a layer or a list of them")
    return [
        path for path in found if (match := _LAYER.match(path)) and int(match[1]) in set(wanted)
    ]


def _matched(given: object, name: str, paths: list[str]) -> list[str]:
    """The paths that a list of names or suffixes, or a pattern of whole paths, matches."""
    if isinstance(given, list) and len(given) <= _NAMES_MAX:
        names = {entry for entry in given if isinstance(entry, str)}
        if len(names) == len(given):
            return [path for path in paths if not names.isdisjoint(_suffixes(path))]
    # PEFT writes `all-linear` out before it saves.
    pattern = parse_pattern("^" + given.removeprefix("^")) if isinstance(given, str) else None
    if pattern is None or given == "all-linear":
        raise AdapterRejected(
            field(name), "must be a list of module names: which modules it matches has to be known"
        )
    return [path for path in paths if pattern.matches(path)]


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
