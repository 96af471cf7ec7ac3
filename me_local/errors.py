"""The one family of errors. Each message says what is wrong, where, and what to do about it."""


class MeLocalError(Exception):
    """Anything that me-local reports to its user in one line; the commands print it without a traceback."""


class ConfigError(MeLocalError):
    """A models.toml, a flag or a setting that cannot be used: names the file and the key."""


class LoadError(MeLocalError):
    """A member that cannot be loaded: names the member and its file."""


class CrashError(LoadError):
    """A member with which llama.cpp ends its process."""


class InputError(MeLocalError):
    """A prompt, a message or an input file that cannot be used: names the place in it."""


class TemplateExcessError(InputError):
    """A chat template that takes more steps, or writes more, than any should."""


class TemplateMemoryError(TemplateExcessError):
    """A chat template that takes more memory than there is."""


class PromptTooLongError(InputError):
    """A prompt that is longer than the context of a member."""


class RunError(MeLocalError):
    """A member that failed while it was running: names the member and the position in its context."""
