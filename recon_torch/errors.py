"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """A mistake in the input or the set-up, not a bug.

    The message is one line that says what is wrong, where, and what to do. The command line prints that line
    alone and exits with code 2; every other exception keeps its traceback.
    """
