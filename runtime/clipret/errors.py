"""The exception and the warning of the library, texts in one line, and the sentence for a missing optional package."""

import importlib
from types import ModuleType

__all__ = ["BackendWarning", "ClipretError", "one_line", "printable", "require"]


class ClipretError(Exception):
    """Something that the user can put right.

    The message says what is wrong, names the value, and says what to do next, in one line:
    commands print it as it is and exit with status 1.
    """


class BackendWarning(UserWarning):
    """Something slower runs than was hoped for: an engine that does not fit this machine, CUDA graphs that fail."""


def one_line(error: BaseException, most: int = 300) -> str:
    """What an exception of another library says, in one line of at most `most` characters; its type where it says
    nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str) -> str:
    """`text` in one line that any terminal and any UTF-8 file can take: control characters, line ends and the bytes of
    file names that are not UTF-8 become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise a ClipretError with the pip command that installs it.

    Heavy and optional packages are imported where they are used, through this function, so that
    `import clipret` stays light and a missing extra costs one sentence rather than a traceback.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, one of its own dependencies is not
        raise ClipretError(f"{package} is not installed: run  pip install 'clipret[{extra}]'") from None
