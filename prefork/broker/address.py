"""Where the broker is: from a URL to what a connection needs."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from redis import RedisError
from redis.connection import SSLConnection, UnixDomainSocketConnection, parse_url

from prefork.broker import embedded
from prefork.errors import BrokerError

FORMS = "redis://host:6379/0, rediss://host:6379/0, unix:///path/to/redis.sock or embedded:./var/prefork"


@dataclass(frozen=True)
class Address:
    """A broker's address. `shown` is for people: it never holds the password."""

    shown: str
    connection_class: type[Any]
    options: dict[str, Any]  # the keyword arguments of redis-py's connection class

    @property
    def path(self) -> str | None:
        """The unix socket, if it is one."""
        return self.options.get("path")

    @property
    def host(self) -> str:
        """The host name of a TCP address."""
        return str(self.options.get("host", "localhost"))

    @property
    def port(self) -> int:
        """The port of a TCP address."""
        return int(self.options.get("port", 6379))

    @property
    def database(self) -> int:
        """The number of the database."""
        return int(self.options.get("db", 0))

    def greeting(self, name: str) -> list[tuple[str | int, ...]]:
        """The commands with which a new connection begins: password, database, name."""
        commands: list[tuple[str | int, ...]] = []
        if password := self.options.get("password"):
            user = self.options.get("username")
            commands.append(("AUTH", user, password) if user else ("AUTH", password))
        if self.database:
            commands.append(("SELECT", self.database))
        commands.append(("CLIENT", "SETNAME", name))
        return commands

    def tls(self) -> ssl.SSLContext | None:
        """The TLS settings of a rediss:// URL, by redis-py's names for them; None for other URLs."""
        if self.connection_class is not SSLConnection:
            return None
        options = self.options
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"))
        required = str(options.get("ssl_cert_reqs", "required"))
        context.check_hostname = required == "required" and options.get("ssl_check_hostname", True)
        context.verify_mode = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL}.get(required, ssl.CERT_REQUIRED)
        if certificate := options.get("ssl_certfile"):
            context.load_cert_chain(certificate, options.get("ssl_keyfile"), options.get("ssl_password"))
        return context


def resolve(url: str) -> Address:
    """The address that a URL names; for `embedded:DIR` the private server is started or joined.

    Raises BrokerError for a URL that is of none of the forms, and for an embedded server that does not start.
    """
    if url.startswith("embedded:"):
        directory = embedded.parse(url)
        return Address(url, UnixDomainSocketConnection, {"path": str(embedded.join(directory))})
    scheme = match[1] if (match := re.match("([a-zA-Z][a-zA-Z0-9+.-]*):", url)) else ""
    if scheme not in ("redis", "rediss", "unix"):
        said = f"the scheme {scheme!r}" if scheme else "no scheme"
        raise BrokerError(f"the broker URL {shown(url)} has {said}; write {FORMS}")
    try:
        options: dict[str, Any] = dict(parse_url(url))  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        said = re.sub(r" as '.*'$", "", str(error))  # that may be a part of the password
        raise BrokerError(f"the broker URL {shown(url)} cannot be read ({said}); write {FORMS}") from None
    connection_class = options.pop("connection_class", None)
    database = urlsplit(url).path.strip("/")
    if scheme != "unix" and database and not database.isdigit():
        name = "…" if set(database) & set(":@") else database  # it may be the rest of a password with a slash
        raise BrokerError(f"the broker URL {shown(url)} names the database {name!r}; databases are numbers")
    if connection_class is None:
        from redis import Connection as connection_class
    options.pop("decode_responses", None)  # ours are bytes
    try:
        connection_class(**options)
    except (TypeError, ValueError, RedisError) as error:
        said = str(error).rpartition("() ")[2]
        raise BrokerError(f"the broker URL {shown(url)} has an option that cannot be used: {said}") from None
    return Address(shown(url), connection_class, options)


def shown(url: str) -> str:
    """The URL without its password, and without its query, which may hold one too."""
    scheme, separator, rest = url.partition("://")
    if not separator or "@" in scheme:
        return url.rpartition("@")[2].partition("?")[0]
    head, _, query = rest.partition("?")
    if "@" in query and "@" not in head and not _PLACE.fullmatch(head):
        return f"{scheme}://…"  # the password has a ? that should have been written as %3F
    userinfo, at, place = head.rpartition("@")
    if scheme in ("redis", "rediss") and not _PLACE.fullmatch(place) and not place.startswith("["):
        return f"{scheme}://…"  # the @ behind the password is missing, perhaps
    user = userinfo.partition(":")[0]
    return f"{scheme}://{user + at if user else ''}{place}"


_PLACE = re.compile(r"([^:/]+(:\d+)?)?(/.*)?")
