"""The library's exception and warning, one-line texts, and the message for a missing optional package."""

import importlib
from types import ModuleType

__all__ = ["BackendWarning", "ClipretError", "one_line", "printable", "require"]


class ClipretError(Exception):
    """An error that the user can fix.

    The message is one line. It says what is wrong, gives the value, and says what to do next. Commands print it
    unchanged and exit with status 1.
    """


class BackendWarning(UserWarning):
    """A slower backend or mode runs instead of the preferred one.

    Examples are a TensorRT engine that does not fit this machine, and CUDA graphs that fail.
    """


def one_line(error: BaseException, max_length: int = 300) -> str:
    """Shorten the message of another library's exception to one line.

    Args:
        error: The exception.
        max_length: Maximum number of characters.

    Returns:
        The message, or the name of the exception's type if the message is empty.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def printable(text: str) -> str:
    r"""Make a text safe for a terminal and a UTF-8 file, in one line.

    Control characters, line breaks and the non-UTF-8 bytes of file names become escapes.

    Examples:
        >>> printable("a\nb")
        'a\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package where it is used, so that `import clipret` stays fast.

    Args:
        module: The module to import.
        extra: The extra of clipret that installs it.

    Raises:
        ClipretError: The package is not installed. The message has the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is installed, one of its dependencies is not
        raise ClipretError(f"{package} is not installed: run  pip install 'clipret[{extra}]'") from error
