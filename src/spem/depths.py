"""The depths that CIFAR ResNets have."""

STEPS = {"bottleneck": 9, "basic": 6}
"""Layers that one more block in each of the three stages adds."""


def blocks_per_stage(depth: object, block: str, *, label: str) -> int:
    """The n of a depth 9n + 2 (bottleneck) or 6n + 2 (basic); ``label`` begins the message.

    Raises:
        ValueError: The blocks cannot make this depth; the message names the nearest ones.
    """
    step = STEPS[block]
    whole = depth if isinstance(depth, int) and not isinstance(depth, bool) else 0
    if whole < step + 2 or (whole - 2) % step:
        below = max(1, (whole - 2) // step)
        raise ValueError(
            f"{label}={depth!r} is not {step}n + 2, which {block} blocks need. "
            f"Nearest: {below * step + 2} or {(below + 1) * step + 2}."
        )
    return (whole - 2) // step
