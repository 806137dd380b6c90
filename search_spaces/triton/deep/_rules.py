"""What the spaces of deep memories share."""


def power(value: int) -> int:
    """The next power of two that products take."""
    return max(16, 1 << (value - 1).bit_length())
