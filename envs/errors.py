"""The errors of the environments: every refusal is one sentence with what, expected, got and how to mend it."""


class EnvError(ValueError):
    """An environment, its demonstrations or a rollout cannot go on; catch it to handle all of them."""


class DemonstrationError(EnvError):
    """The demonstrations cannot be used; the message says why and what to do."""
