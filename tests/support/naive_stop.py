"""Stop strings by the definition."""


def naive(text: str, strings: list[str]) -> tuple[str, bool]:
    """The first stop string that is complete, found by trying every end."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in strings if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False
