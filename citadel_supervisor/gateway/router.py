"""Which model answers: the names a request may use, and the choice where it uses none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import BadRequest, UnknownModel
from citadel_supervisor.gateway.backend import Backend
from citadel_supervisor.states import COMING_UP

AUTO = "auto"
LONGEST_SHOWN = 100
"""Characters of an unknown name that an error repeats."""


class Chosen(NamedTuple):
    """The model that answers a request."""

    model: str
    backend: Backend


class _Named(msgspec.Struct):
    """The one field of a request's body that the router reads."""

    model: str | None = None


class Catalog:
    """The models and their names. Immutable."""

    def __init__(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        preferred = settings.default_model
        order = sorted(settings.models, key=lambda model: model != preferred)
        self._in_order = [Chosen(model, backends[model]) for model in order]
        self._by_name = {chosen.model: chosen for chosen in self._in_order}
        for model, section in settings.models.items():
            self._by_name |= dict.fromkeys(section.aliases, self._by_name[model])
        self._known = [*settings.models, AUTO]

    def named(self, name: str) -> Chosen:
        """The model of that id or alias. Raises UnknownModel."""
        chosen = self._by_name.get(name)
        if chosen is None:
            shown = name if len(name) <= LONGEST_SHOWN else name[:LONGEST_SHOWN] + "…"
            raise UnknownModel(shown, self._known)
        return chosen

    def resolve(self, name: str | None) -> Chosen:
        """The model that answers a request for `name`; "auto", "" and None leave the choice to the router.

        The router takes the least loaded of the ready models, else the first that is coming up, else the
        first; equals in the order of the configuration, the default model before all.
        Raises UnknownModel.
        """
        return self.named(name) if name and name != AUTO else self._pick()

    def _pick(self) -> Chosen:
        best: Chosen | None = None
        least = 0
        coming: Chosen | None = None
        for chosen in self._in_order:
            seen = chosen.backend.snapshot()
            load = seen.active_requests + seen.waiting_requests
            if seen.ready and (best is None or load < least):
                best, least = chosen, load
            elif coming is None and seen.state in COMING_UP:
                coming = chosen
        return best or coming or self._in_order[0]


class ModelName:
    """Reads the model's name from the body of a request, and nothing else of it."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_Named).decode

    def read(self, body: bytes) -> str | None:
        """The name; None if there is none. Raises BadRequest unless the body is a JSON object."""
        try:
            return self._decode(body).model
        except msgspec.ValidationError as error:
            if "$.model" in str(error):
                raise BadRequest("'model' must be a string", "model") from None
            raise BadRequest("the request's body must be a JSON object") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"the request's body is not valid JSON: {error}") from None
        except RecursionError:
            raise BadRequest("the request's body is nested too deeply") from None
