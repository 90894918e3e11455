"""The errors that a user of Shoal can see."""


class StartError(Exception):
    """Something that keeps a process from starting: a flag, a model folder, a taken port. The message is one
    line, names the cause and the remedy, and is shown without a stack trace."""


class FlagError(StartError):
    """A command line that cannot be honoured; the message names the flag. Ends with exit code 2."""


class ModelError(StartError):
    """A model folder or file that cannot be served; the message names the file and the field."""


class RequestError(Exception):
    """A request that is refused: an HTTP status, a message for the client, the field at fault, OpenAI's code; with 401
    how to authenticate (WWW-Authenticate)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        challenge: str = "Bearer",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.challenge = challenge
