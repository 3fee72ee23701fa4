"""What another library says, made the end of one sentence."""


def one_line(error: BaseException, most: int | None = 300) -> str:
    """The error's text without line breaks; no more than its first `most` letters, None: all."""
    return " ".join(str(error).split())[:most]


def reason_of(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, None)
