"""Where the broker is: from a URL to what a connection needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from prefork.errors import BrokerError

if TYPE_CHECKING:
    import ssl

FORMS = "redis://host:6379/0, rediss://host:6379/0, unix:///path/to/redis.sock or embedded:./var/prefork"
TLS_OPTIONS = (
    "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_check_hostname", "ssl_certfile", "ssl_keyfile", "ssl_password",
)  # fmt: skip
CERT_REQS = ("none", "optional", "required")
FALSE = ("0", "f", "false", "n", "no")
# redis-py's, in URLs that are shared with it. What they ask for is ours to decide, or makes no difference here.
IGNORED = (
    "client_name", "decode_responses", "encoding", "encoding_errors", "health_check_interval", "lib_name",
    "lib_version", "max_connections", "protocol", "retry_on_error", "retry_on_timeout", "socket_connect_timeout",
    "socket_keepalive", "socket_read_size", "socket_timeout", "timeout",
)  # fmt: skip


@dataclass(frozen=True)
class Address:
    """A broker's address. `shown` is for people: it never holds the password.

    `path`: the unix socket, if it is one; `tls_options`: those of a rediss:// URL, None for other URLs.
    """

    shown: str
    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    database: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    tls_options: dict[str, str] | None = field(default=None, repr=False)

    def greeting(self, name: str) -> list[tuple[str | int, ...]]:
        """The commands with which a new connection begins: password, database, name."""
        commands: list[tuple[str | int, ...]] = []
        if self.password:
            commands.append(("AUTH", self.user, self.password) if self.user else ("AUTH", self.password))
        if self.database:
            commands.append(("SELECT", self.database))
        commands.append(("CLIENT", "SETNAME", name))
        return commands

    def tls(self) -> ssl.SSLContext | None:
        """The TLS settings of a rediss:// URL; None for other URLs. Raises OSError for files that can't be used."""
        if self.tls_options is None:
            return None
        import ssl

        options = self.tls_options
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"))
        required = options.get("ssl_cert_reqs", "required")
        checked = options.get("ssl_check_hostname", "true").lower() not in FALSE
        context.check_hostname = required == "required" and checked
        context.verify_mode = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL}.get(required, ssl.CERT_REQUIRED)
        if certificate := options.get("ssl_certfile"):
            context.load_cert_chain(certificate, options.get("ssl_keyfile"), options.get("ssl_password"))
        return context


def resolve(url: str) -> Address:
    """The address that a URL names; for `embedded:DIR` the private server is started or joined.

    Raises BrokerError for a URL that is of none of the forms, and for an embedded server that does not start.
    """
    if url.startswith("embedded:"):
        from prefork.broker import embedded

        return Address(url, path=str(embedded.join(embedded.parse(url))))
    scheme = match[1] if (match := re.match("([a-zA-Z][a-zA-Z0-9+.-]*):", url)) else ""
    if scheme not in ("redis", "rediss", "unix"):
        said = f"the scheme {scheme!r}" if scheme else "no scheme"
        raise BrokerError(f"the broker URL {shown(url)} has {said}; write {FORMS}")
    try:
        return _read(scheme, url)
    except ValueError as error:
        said = re.sub(r" as '.*'$", "", str(error))  # that may be a part of the password
        raise BrokerError(f"the broker URL {shown(url)} cannot be read ({said}); write {FORMS}") from None


def _read(scheme: str, url: str) -> Address:
    """Raises ValueError, and BrokerError for what is said in other words."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if not url.startswith(f"{scheme}://"):
        raise ValueError(f"it does not begin with {scheme}://")
    path = unquote(parts.path)
    if scheme == "unix":
        if not path:
            raise ValueError("it names no socket")
        place, database = Address(shown(url), path=path), ""
    else:
        place = Address(shown(url), host=unquote(parts.hostname or "localhost"), port=parts.port or 6379)
        database = path.strip("/")
        if database and not database.isdigit():
            name = "…" if set(database) & set(":@") else database  # it may be the rest of a password with a slash
            raise BrokerError(f"the broker URL {shown(url)} names the database {name!r}; databases are numbers")
    database = options.pop("db", database) or "0"
    if not database.isdecimal():
        raise ValueError("db is no number")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    user, password = options.pop("username", user), options.pop("password", password)
    tls = {name: options.pop(name) for name in TLS_OPTIONS if name in options} if scheme == "rediss" else None
    unusable = [name for name in options if name not in IGNORED]
    if tls and tls.get("ssl_cert_reqs", "none") not in CERT_REQS:
        unusable.append("ssl_cert_reqs")
    if unusable:
        raise BrokerError(f"the broker URL {shown(url)} has an option that cannot be used: {', '.join(unusable)}")
    return Address(place.shown, place.host, place.port, place.path, int(database), user, password, tls)


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
