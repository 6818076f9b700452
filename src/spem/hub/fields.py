"""Tables from JSON files, checked field by field before anything is made of them."""

from collections.abc import Mapping
from typing import Any, cast


def fields(subject: str, values: object, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The fields of a table, all there and none besides, each of one of its types.

    Args:
        subject: What the table is, the start of messages.
        values: What was read.
        kinds: The names of the fields and the types their values may have.

    Raises:
        ValueError: No table, a field that is unknown or missing, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{subject} must be a table of fields, found {type(values).__name__}.")
    table = cast("dict[str, Any]", values)
    unknown, missing = sorted(table.keys() - kinds.keys()), sorted(kinds.keys() - table.keys())
    if unknown or missing:
        what = f"has no field {unknown[0]!r}" if unknown else f"lacks the field {missing[0]!r}"
        raise ValueError(
            f"{subject} {what}; it takes {', '.join(kinds)}. "
            f"The file comes from another version of spem, or was edited."
        )
    for name, allowed in kinds.items():
        value = table[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"{subject}: {name}={value!r} must be of type {names}.")
    return table


def sequence(subject: str, name: str, value: object, kind: type) -> tuple[Any, ...] | None:
    """A list of values of one type as a tuple; None stays None.

    Raises:
        ValueError: No such list.
    """
    if value is None:
        return None
    items = cast("list[Any]", value) if isinstance(value, (list, tuple)) else None
    kinds = (int, float) if kind is float else (kind,)
    if items is None or any(not isinstance(i, kinds) or isinstance(i, bool) for i in items):
        raise ValueError(f"{subject}: {name}={value!r} must be a list of {kind.__name__}.")
    return tuple(items)
