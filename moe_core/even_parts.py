"""How many of something each of several gets. Knows numbers only."""


def even_parts(total: int, parts: int) -> list[int]:
    """`total` over `parts`, the first ones one more where it does not divide."""
    return [total // parts + (part < total % parts) for part in range(parts)]
