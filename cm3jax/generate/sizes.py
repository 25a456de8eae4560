"""Sizes of arrays: few, since each compiles a program of its own."""


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def multiple(count: int, of: int) -> int:
    """The smallest multiple of `of` that is at least `count`."""
    return -(-count // of) * of


def slots(needed: int, at_last: int, smallest: int) -> int:
    """Slots of a cache that needs so many now, where no row comes further than `at_last`.

    Attention reads all of them: at most a quarter (of the power of two above, or `smallest`) is empty, and at the end
    at most an eighth.
    """
    power = power_of_two(needed)
    step, last_step = (max(power // part, smallest) for part in (4, 8))
    return min(multiple(needed, step), multiple(at_last, last_step))
