"""The command line of `me-local`: a module for each command, and what they share.

Knows nothing of how replies are made. `program` has all commands, and is imported when they are run.
"""

import signal


def main() -> None:
    """Run the command line.

    To import what it needs takes half a second, in which Ctrl-C ends the process as it ends any other: an exception
    could come out of anything that is being imported. The first command that runs sees to Ctrl-C itself (`interrupt`).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from me_local.cli.program import main as program

    program()
