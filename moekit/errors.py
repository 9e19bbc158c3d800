"""The one exception that means: the user's input is at fault, and here is what to do."""


class UserError(ValueError):
    """Bad data, configuration or checkpoint given by the user.

    The message says what is required, what was got (file and line, or key) and what to do. Command lines print it
    without a traceback and exit with code 2.
    """
