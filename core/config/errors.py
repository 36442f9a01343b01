"""What a user can mend in a configuration, told all at once."""


class ConfigError(ValueError):
    """Everything wrong with a configuration, one problem a line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration"
        super().__init__("\n".join([count, *(f"  {problem}" for problem in problems)]))
