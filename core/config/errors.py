"""Errors that the user can mend by other flags."""


class FlagError(ValueError):
    """A value of a flag that cannot be had. The message begins with the flag's name."""


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration"
        super().__init__("\n".join([count, *(f"  {problem}" for problem in problems)]))
