"""The whole way over TLS, with a CA of our own, against a server that is built with it (Debian's redis-server is)."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork import BrokerError, Prefork
from tests.broker.wires import free_port
from tests.cli.command import as_json, prefork
from tests.conftest import PATIENCE_S, Project, Server

PASSWORD = "SESAME"


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a certificate for localhost and one for another host, one of a client; and another CA."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("papers")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "foreign"):
        openssl(folder, "req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2",
                "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    for name, host in (("server", "localhost"), ("elsewhere", "elsewhere"), ("client", "client")):
        (folder / f"{name}.ext").write_text(
            f"subjectAltName=DNS:{host}\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
        )
        openssl(folder, "req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={host}")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-out", f"{name}.pem", "-days", "2", "-extfile", f"{name}.ext")  # fmt: skip
    return folder


def encrypted(papers: Path, name: str, *options: str) -> tuple[Server, int]:
    """A server with a TLS port, and a plain socket for the test itself."""
    binary = shutil.which("redis-server")
    if not binary or "--tls" not in subprocess.run([binary, "--help"], capture_output=True, text=True).stdout + "--tls":
        pytest.skip("needs a redis-server with TLS")
    port = free_port()
    tls = ("--tls-port", str(port), "--tls-cert-file", f"{papers}/{name}.pem", "--tls-key-file", f"{papers}/{name}.key",
           "--tls-ca-cert-file", f"{papers}/ca.pem")  # fmt: skip
    try:
        return Server(binary, *tls, *options), port
    except BaseException:  # not built with TLS: it ends at once
        if subprocess.run([binary, *tls, "--port", "0"], capture_output=True, timeout=5).returncode:
            pytest.skip("this redis-server has no TLS")
        raise


@pytest.fixture(scope="module")
def strict(papers: Path) -> Iterator[tuple[Server, int]]:
    """It wants a certificate of the client's own, and a password."""
    server, port = encrypted(papers, "server", "--tls-auth-clients", "yes")
    server.client.config_set("requirepass", PASSWORD)
    yield server, port
    server.close()


@pytest.fixture(scope="module")
def misnamed(papers: Path) -> Iterator[int]:
    server, port = encrypted(papers, "elsewhere", "--tls-auth-clients", "no")
    yield port
    server.close()


def test_worker_producer_and_operator_over_tls(papers: Path, strict: tuple[Server, int], tmp_path: Path) -> None:
    server, port = strict
    mine = f"ssl_ca_certs={papers}/ca.pem&ssl_certfile={papers}/client.pem&ssl_keyfile={papers}/client.key"
    url = f"rediss://:{PASSWORD}@localhost:{port}/0?{mine}"
    project = Project(tmp_path, server, f"over_tls_{port}")
    try:
        worker = project.worker(f"broker = {url}")
        project.tasks.app.connect_to(url, None)
        assert [
            it.wait(timeout=60) for it in project.tasks.app.enqueue_many(project.tasks.add.s(n) for n in range(200))
        ]
        (queue,) = as_json("queues", "--broker", url)
        assert queue["processed"] == 200
        assert worker.stop() == 0
        assert PASSWORD not in worker.log
    finally:
        project.close()


WRONG = {
    "no certificate of ours": ("localhost", "ca", "asks for a certificate of ours"),
    "a CA that is not theirs": ("localhost", "foreign", "has a certificate that is not trusted"),
    "no CA": ("localhost", "", "has a certificate that is not trusted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_tls_is_one_line(papers: Path, strict: tuple[Server, int], name: str) -> None:
    host, ca, said = WRONG[name]
    url = f"rediss://:{PASSWORD}@{host}:{strict[1]}/0" + (f"?ssl_ca_certs={papers}/{ca}.pem" if ca else "")
    told = prefork("queues", "--broker", url, code=69)
    assert said in told
    assert told.count("\n") == 1
    assert PASSWORD not in told


def test_a_certificate_for_another_host_is_refused_unless_told_otherwise(papers: Path, misnamed: int) -> None:
    url = f"rediss://localhost:{misnamed}/0?ssl_ca_certs={papers}/ca.pem"
    begun = time.monotonic()
    app = Prefork("shop", broker=url, limit_s=PATIENCE_S)
    with pytest.raises(BrokerError, match="has a certificate that is not trusted"):
        app.task(name="t")(lambda: None).enqueue()
    assert time.monotonic() - begun < PATIENCE_S, "it is not tried again"
    assert as_json("queues", "--broker", f"{url}&ssl_check_hostname=false") == []


def test_a_file_that_is_no_certificate_is_said(papers: Path, misnamed: int) -> None:
    for option, path in (("ssl_ca_certs", "/no/such.pem"), ("ssl_certfile", f"{papers}/ca.ext")):
        told = prefork("queues", "--broker", f"rediss://localhost:{misnamed}/0?{option}={path}", code=69)
        assert told.count("\n") == 1
        assert "Traceback" not in told
