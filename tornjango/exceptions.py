"""Everything that tornjango itself raises.

TornjangoError
├── ConfigurationError      the project's settings are wrong (also Django's ImproperlyConfigured)
├── ResponseStateError      a deferred response was used in a way its state forbids
├── Overloaded              a bounded queue is full, or waiting in it took too long: 503, Retry-After
├── TemplateQueryError      a template would have queried the database in the middle of rendering
└── CometError
    ├── InvalidCursor       not a cursor of ours: 400 (also Django's BadRequest)
    ├── UnknownChannel      no declared channel has this name: 404
    ├── ChannelForbidden    the channel's authoriser said no: 403 (also Django's PermissionDenied)
    ├── TooManyMessages     a client publishes more than it may: 429, Retry-After
    └── BrokerUnavailable   the broker cannot be reached, or does not answer: 503, Retry-After (also Overloaded)

Errors of a database keep Django's own classes (``django.db.utils``), whatever engine ran the query.
"""

from __future__ import annotations

from collections.abc import Sequence

from django.core.exceptions import BadRequest, ImproperlyConfigured, PermissionDenied


class TornjangoError(Exception):
    """The base of all the errors of this package."""


class ConfigurationError(TornjangoError, ImproperlyConfigured):
    """A setting is wrong; the message names the key and what it takes."""


class ResponseStateError(TornjangoError, RuntimeError):
    """A deferred response was ended twice, or changed after its end; the message names the view."""


class Overloaded(TornjangoError):
    """A bounded queue is full or its time-out has passed; a client is answered 503.

    ``retry_after`` is what the ``Retry-After`` header will say, in seconds.
    """

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TemplateQueryError(TornjangoError):
    """A template would have queried the database while rendering; the message names variable and template."""


class CometError(TornjangoError):
    """The base of the errors of ``tornjango.comet``; ``status`` is the HTTP status a client is answered."""

    status = 400


class InvalidCursor(CometError, BadRequest):
    """The cursor was not made by this project, or was changed on its way."""


class UnknownChannel(CometError):
    """No declared channel pattern matches this name."""

    status = 404


class ChannelForbidden(CometError, PermissionDenied):
    """The channel's authoriser refused this request. ``channels`` names those, of a reader, that it may read no longer."""

    status = 403

    def __init__(self, message: str, channels: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.channels = channels


class TooManyMessages(CometError):
    """A client publishes more than ``TORNJANGO["COMET"]["PUBLISHES_PER_SECOND"]``; ``retry_after`` is in seconds."""

    status = 429

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BrokerUnavailable(CometError, Overloaded):
    """The broker cannot be reached, or has not answered in time; a client is answered 503.

    A message that was being published may have arrived all the same, or not at all; never twice.
    """

    status = 503

    def __init__(self, message: str, *, retry_after: int = 2) -> None:
        super().__init__(message, retry_after=retry_after)
