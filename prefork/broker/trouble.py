"""What went wrong with the broker, in one line with its remedy."""

from __future__ import annotations

from prefork.errors import BrokerError

# What a reply or an exception says -> what it means for the user. The first that matches holds.
REMEDIES = (
    ("WRONGPASS", "refuses the password; check user and password in the broker URL"),
    ("invalid password", "refuses the password; check user and password in the broker URL"),
    ("invalid username-password", "refuses the password; check user and password in the broker URL"),
    ("NOAUTH", "asks for a password; put it into the broker URL: redis://:password@host:6379/0"),
    ("Authentication required", "asks for a password; put it into the broker URL: redis://:password@host:6379/0"),
    ("without any password configured", "has no password set; take it out of the broker URL"),
    ("NOPERM", "does not permit this user what prefork needs ({said}); extend its ACL"),
    ("No permissions", "does not permit this user what prefork needs ({said}); extend its ACL"),
    ("no permission", "does not permit this user what prefork needs ({said}); extend its ACL"),
    ("can't run this command", "does not permit this user what prefork needs ({said}); extend its ACL"),
    ("DENIED", "runs in protected mode; connect from its own host, or set a password on it"),
    ("READONLY", "is a read-only replica; name the primary in the broker URL"),
    ("read only replica", "is a read-only replica; name the primary in the broker URL"),
    ("Link with MASTER is down", "is a replica whose primary is gone; name the primary in the broker URL"),
    ("DB index", "has no such database ({said}); check the number at the end of the broker URL"),
    ("MISCONF", "cannot save to its disk and refuses writes ({said}); look at its log and its disk"),
    (
        "used memory > 'maxmemory'",
        "is out of memory and refuses writes; raise its maxmemory, or empty what is not needed",
    ),
    ("OOM", "is out of memory and refuses writes; raise its maxmemory, or empty what is not needed"),
    ("out of memory", "is out of memory and refuses writes; raise its maxmemory, or empty what is not needed"),
    ("NOREPLICAS", "has too few replicas to accept writes; see its min-replicas-to-write"),
    ("LOADING", "is still loading its data; try again soon"),
    ("loading the dataset", "is still loading its data; try again soon"),
    ("BUSY", "is busy with a script of somebody else; see SCRIPT KILL"),
    ("max number of clients", "has no connection left; raise its maxclients"),
    ("CLUSTERDOWN", "is a cluster that is down; look at CLUSTER INFO"),
    ("The cluster is down", "is a cluster that is down; look at CLUSTER INFO"),
    ("Multiple keys request during rehashing", "is a cluster that is moving its data; try again soon"),
    ("Hash slot not served", "is a cluster that is down; look at CLUSTER INFO"),
    ("MOVED", "is a Redis Cluster, which prefork does not support yet; name a single server"),
    ("Name or service not known", "is on a host whose name is not known; check the broker URL"),
    ("nodename nor servname", "is on a host whose name is not known; check the broker URL"),
    ("name resolution", "is on a host whose name cannot be looked up now; check the broker URL and the DNS"),
    ("No address associated", "is on a host whose name has no address; check the broker URL"),
    ("Connection refused", "refuses the connection; is it running there?"),
    ("No such file", "has no socket there; is it running, and is this its path?"),
    ("Permission denied", "has a socket that this user may not open; check its mode"),
    ("verify failed", "has a certificate that is not trusted ({said}); see ssl_ca_certs in docs/configuration.md"),
    ("certificate required", "asks for a certificate of ours; see ssl_certfile in docs/configuration.md"),
    (
        "EOF occurred",
        "ends the TLS handshake; if it asks for a certificate of ours: ssl_certfile, docs/configuration.md",
    ),
    ("wrong version number", "does not speak TLS; write redis:// in place of rediss://"),
    ("imed out", "does not answer in time; is it a Redis, and is the network open?"),
    ("timeout", "does not answer in time; is it a Redis, and is the network open?"),
    ("Timeout", "does not answer in time; is it a Redis, and is the network open?"),
    ("Protocol error", "does not speak Redis's protocol; check host and port in the broker URL"),
    ("Protocol Error", "does not speak Redis's protocol; check host and port in the broker URL"),
    ("InvalidResponse", "does not speak Redis's protocol; check host and port in the broker URL"),
    ("Error setting client name", "does not speak Redis's protocol; check host and port in the broker URL"),
    ("nknown command", "does not know a command that prefork needs ({said}); is it a Redis, with none renamed?"),
    ("closed", "closed the connection; is it a Redis, and what does its log say?"),
    ("Connection reset", "broke the connection off; is it a Redis, and what does its log say?"),
    ("Broken pipe", "broke the connection off; is it a Redis, and what does its log say?"),
)


# What does not pass by itself.
LASTING = (
    "refuses the password", "asks for a password", "has no password set", "does not permit", "runs in protected mode",
    "has no such database", "has no connection left", "certificate", "does not speak",
)  # fmt: skip


def lasts(said: str) -> bool:
    """Whether somebody has to do something about what `explain` has said."""
    return any(mark in said for mark in LASTING)


def tells_little(said: str) -> bool:
    """Whether a connection just ended, for whatever reason: the next attempt may learn it."""
    return "closed the connection" in said or "broke the connection off" in said


def explain(error: BaseException | str, shown: str, password: str | None = None) -> BrokerError:
    """A BrokerError for what the server's reply or the socket said. `shown`: the address, no password."""
    said = str(error).strip() or type(error).__name__
    if password:  # some servers and proxies repeat what they did not understand
        said = said.replace(password, "***")
    if isinstance(error, TimeoutError):
        said = f"timed out {said}"
    elif isinstance(error, OSError) and (reason := getattr(error, "reason", "")):  # of ssl's, without its import
        said = f"{reason} {said}"
    late = "imed out" in said or "imeout" in said
    if late and shown.startswith("rediss:") and "resolution" not in said:
        return BrokerError(f"the broker {shown} does not answer in time; does it speak TLS, and is the network open?")
    for mark, meaning in REMEDIES:
        # What is written in capitals is a server's word, which comes first; a path or a host may hold it too.
        if (said.startswith(mark) if mark.isupper() else mark in said) or mark in type(error).__name__:
            return BrokerError(f"the broker {shown} {meaning.format(said=_line(said))}")
    return BrokerError(f"the broker {shown} cannot be used: {_line(said)}; is it a Redis, and what does its log say?")


def _line(said: str) -> str:
    """What a terminal may show, on one line: whoever answers there may not be a Redis at all."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in said.splitlines()[0][:200])
