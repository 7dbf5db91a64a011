"""What is asked and answered, as JSON; its limits are here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_BODY = 2**20  # bytes of a request
MAX_HISTORY = 1000  # tokens; models read the newest 50 or so, the rest only counts as seen
MAX_HISTORIES = 256
MAX_K = 1000
MAX_TOKEN = 200  # characters


def _as_text(token: Any) -> Any:
    if isinstance(token, int) and not isinstance(token, bool):
        return str(token)
    if isinstance(token, str) and not token.isascii():
        try:
            token.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise ValueError("a text that cannot be written as UTF-8") from None
    return token


def _some_tokens(history: Any) -> Any:
    if isinstance(history, list) and not history:
        raise ValueError("an empty history; give at least one token")
    return history


Token = Annotated[
    str, BeforeValidator(_as_text), StringConstraints(min_length=1, max_length=MAX_TOKEN)
]
History = Annotated[
    list[Token],
    BeforeValidator(_some_tokens),
    Field(max_length=MAX_HISTORY, description="tokens of the catalogue, oldest first"),
]


class Options(BaseModel):
    """What holds for each history of a request."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(20, ge=1, le=MAX_K, strict=True, description="how many items")
    exclude_seen: bool = Field(False, strict=True, description="leave out the history's items")
    strict: bool = Field(
        False, strict=True, description="unknown tokens are an error; otherwise they are skipped"
    )
    model: str | None = Field(None, description="a name of /models; the first one if left out")


class Ask(Options):
    """A history to recommend for."""

    history: History


class AskMany(Options):
    """Histories to recommend for."""

    histories: list[Annotated[list[Token], Field(max_length=MAX_HISTORY)]] = Field(
        min_length=1, max_length=MAX_HISTORIES
    )


class Answer(BaseModel):
    """The best items of a history, best first."""

    tokens: list[str]
    scores: list[float]
    skipped: list[str] = Field(description="tokens of the history that the catalogue lacks")
    model: str
    version: int
    milliseconds: float = Field(description="of the model, for the whole batch")
    batch: int = Field(description="histories that were answered in the same call")


class Failure(BaseModel):
    """Why there is no answer."""

    error: str


class Answers(BaseModel):
    """An answer or an error for each history, in the order in which they came."""

    answers: list[Answer | Failure]


class Reload(BaseModel):
    """Which model to load again; all of them if left out."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
