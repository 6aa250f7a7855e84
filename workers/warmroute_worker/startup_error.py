"""Why a worker cannot start."""


class StartupError(Exception):
    """Model, arguments or memory do not allow it; the message is one line for the user, without a traceback."""
