"""Flags and environment -> `RouterConfig`, remembering where each value came from.

The flags are derived from the fields of `RouterConfig`, so that none can exist without a field or the other way round.
A value is taken from the command line, else from `WARMROUTE_<FIELD>`, else it is the default.
"""

import argparse
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from warmroute.config import ConfigError, RouterConfig
from warmroute.refused_flags import REFUSED_FLAGS

Origin = Literal["command line", "environment", "default", "drawn at start"]

ENVIRONMENT_PREFIX = "WARMROUTE_"

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """A configuration and the origin of each of its fields."""

    config: RouterConfig
    origins: Mapping[str, Origin]

    def with_drawn(self, **values: Any) -> "Settings":
        """As it is, with values that were left to chance now filled in."""
        drawn: dict[str, Origin] = dict.fromkeys(values, "drawn at start")
        return Settings(dataclasses.replace(self.config, **values), {**self.origins, **drawn})

    def shown(self) -> dict[str, dict[str, Any]]:
        """Every effective value with its origin, without secrets; for `GET /config`."""
        answer = {}
        for field in dataclasses.fields(self.config):
            value = getattr(self.config, field.name)
            if field.metadata["secret"] and value is not None:
                value = "***"
            answer[field.name] = {"value": value, "origin": self.origins[field.name]}
        return answer


def parse_router_command_line(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """For `launch_router`. Ends the process with status 2 and one line when something is wrong."""
    parser = FlagParser(
        prog="launch_router",
        description="Sends each LLM request to the worker whose cache is warm.",
        epilog="--check-config validates all this and exits. --check also asks each worker once what it serves, and "
        "exits with 0 if all can be used. SIGTERM drains, SIGHUP starts the program anew without losing a request.",
    )
    add_router_flags(parser)
    return settings_of(parser, parser.parse_args(argv), environment)


class FlagParser(argparse.ArgumentParser):
    """Complains in one line: a usage text of fifty flags would hide it."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        # No abbreviations: `--cache` would silently mean something else once a second flag starts like that.
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_router_flags(parser: argparse.ArgumentParser, prefix: str = "", skip: Sequence[str] = ()) -> None:
    """A flag for every field but those in `skip`; `prefix` is put before the names ("router-" for launch_server)."""
    hints = get_type_hints(RouterConfig)
    for field in dataclasses.fields(RouterConfig):
        if field.name in skip:
            continue
        flag = f"--{prefix}{field.name.replace('_', '-')}"
        dest = _dest(prefix, field.name)
        text = field.metadata["help"].replace("%", "%%")
        hint = hints[field.name]
        if hint is bool:
            # What is on unless told otherwise can be switched off, by --no-...
            action: Any = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(flag, dest=dest, action=action, default=argparse.SUPPRESS, help=text)
            continue
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        if shown not in (None, ""):
            text += f" (default: {shown})"
        options: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": text}
        choices = next((one for one in (hint, *get_args(hint)) if get_origin(one) is Literal), None)
        if choices is not None:
            options["choices"] = get_args(choices)
        else:
            options |= {"type": _scalar(hint), "metavar": field.metadata["unit"]}
        if get_origin(hint) is tuple:
            options |= {"nargs": "*", "action": "extend"}
        parser.add_argument(flag, **options)
    for name, reason in REFUSED_FLAGS.items():
        parser.add_argument(
            f"--{prefix}{name}", dest=argparse.SUPPRESS, nargs="*", action=_Refuse, const=reason, help=argparse.SUPPRESS
        )


def settings_of(
    parser: argparse.ArgumentParser,
    values: argparse.Namespace,
    environment: Mapping[str, str],
    prefix: str = "",
    fixed: Mapping[str, Any] = types.MappingProxyType({}),
) -> Settings:
    """`fixed`: fields that were determined otherwise; they count as given on the command line."""
    given: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    hints = get_type_hints(RouterConfig)
    try:
        for field in dataclasses.fields(RouterConfig):
            name, dest = field.name, _dest(prefix, field.name)
            variable = ENVIRONMENT_PREFIX + name.upper()
            origins[name] = "default"
            if name in fixed:
                given[name], origins[name] = fixed[name], "command line"
            elif hasattr(values, dest):
                value = getattr(values, dest)
                given[name], origins[name] = tuple(value) if isinstance(value, list) else value, "command line"
            elif variable in environment:
                given[name], origins[name] = _of_text(hints[name], variable, environment[variable]), "environment"
        return Settings(RouterConfig(**given), origins)
    except ConfigError as error:
        parser.error(str(error))


class _Refuse(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> NoReturn:
        parser.error(f"{option}: {self.const}")


def _dest(prefix: str, name: str) -> str:
    return prefix.replace("-", "_") + name


def _scalar(hint: Any) -> Callable[[str], Any]:
    """The type of one value: of `int | None` int, of `tuple[str, ...]` str."""
    for scalar in (int, float, str):
        if hint is scalar or scalar in get_args(hint):
            return scalar
    raise AssertionError(f"no flag can be made of {hint}")


def _of_text(hint: Any, variable: str, text: str) -> Any:
    """Raises ConfigError, which names the variable."""
    if hint is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ConfigError(variable, text, "must be 1 or 0")
        return text.lower() in _TRUE
    if get_origin(hint) is Literal:
        return text  # RouterConfig checks it
    scalar = _scalar(hint)
    try:
        if get_origin(hint) is tuple:
            return tuple(map(scalar, text.replace(",", " ").split()))
        return scalar(text)
    except ValueError:
        raise ConfigError(variable, text, f"is not of type {scalar.__name__}") from None
